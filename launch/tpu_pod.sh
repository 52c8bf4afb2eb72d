#!/usr/bin/env bash
# A training run on a Cloud TPU pod, from its creation to its end. Needs gcloud, logged in, and this checkout.
#
#   launch/tpu_pod.sh create  --name NAME --zone ZONE --type v6e-64 [--project P] [--runtime VERSION] [--spot]
#   launch/tpu_pod.sh setup   --name NAME --zone ZONE          copies this checkout to all hosts and installs it there
#   launch/tpu_pod.sh run     --name NAME --zone ZONE -- --config=configs/pretrain.py:llama_8b --workdir=gs://BUCKET/RUN ...
#   launch/tpu_pod.sh logs    --name NAME --zone ZONE [--worker 0]
#   launch/tpu_pod.sh status  --name NAME --zone ZONE
#   launch/tpu_pod.sh stop    --name NAME --zone ZONE          the run saves its state and ends with status 75
#   launch/tpu_pod.sh resume  --name NAME --zone ZONE --type …  after a preemption or `stop`: what is missing of the above, again
#   launch/tpu_pod.sh delete  --name NAME --zone ZONE
#
# --dry-run, before or after the command, prints what would be done. Exit status: 2 for a mistake in the arguments.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "error: $*" >&2
    exit 2
}

usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"
}

name='' zone='' type='' project='' runtime='' worker=0 spot=false dry_run=false command=''
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --name | --zone | --type | --project | --runtime | --worker)
            [ $# -ge 2 ] && [ "${2#--}" = "$2" ] || fail "$1 needs a value"
            printf -v "${1#--}" '%s' "$2"
            shift
            ;;
        --spot) spot=true ;;
        --dry-run) dry_run=true ;;
        --help | -h)
            usage
            exit 0
            ;;
        --)
            shift
            arguments=("$@")
            break
            ;;
        -*) fail "unknown argument $1; see --help" ;;
        *)
            [ -z "$command" ] || fail "two commands: $command and $1"
            command=$1
            ;;
    esac
    shift
done
[ -n "$command" ] || fail "a command is missing: create, setup, run, logs, status, stop, resume or delete"
case $command in
    create | setup | run | logs | status | stop | resume | delete) ;;
    *) fail "unknown command $command; see --help" ;;
esac
[ -n "$name" ] || fail "--name is missing"
[ -n "$zone" ] || fail "--zone is missing"
[ ${#arguments[@]} -eq 0 ] || [ "$command" = run ] || fail "$command takes nothing after --"

# What `run` was given, for `resume`.
saved="runs/.launch/$name"
where=(--zone "$zone")
[ -z "$project" ] || where+=(--project "$project")

do_it() {
    if $dry_run; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

on_all() { do_it gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"; }

# Runtime images by generation, where none is asked for: cloud.google.com/tpu/docs/runtimes
default_runtime() {
    case $type in
        v6e-*) echo v2-alpha-tpuv6e ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v4-*) echo tpu-ubuntu2204-base ;;
        *) fail "no runtime is known for --type $type: name one with --runtime" ;;
    esac
}

state() { gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)' 2>/dev/null || echo ABSENT; }

create() {
    [ -n "$type" ] || fail "--type is missing: v6e-64, v5p-64, v5litepod-16, ..."
    [ -n "$runtime" ] || runtime=$(default_runtime)
    local options=(--accelerator-type="$type" --version="$runtime")
    $spot && options+=(--spot)
    do_it gcloud compute tpus tpu-vm create "$name" "${where[@]}" "${options[@]}"
}

setup() {
    local archive
    archive=$(mktemp -t llm_jax.XXXXXX)
    # What git tracks, as it is on disk: neither environments nor runs.
    do_it sh -c "git ls-files -z | tar --null --files-from=- -czf '$archive'"
    do_it gcloud compute tpus tpu-vm scp "$archive" "$name":llm_jax.tar.gz "${where[@]}" --worker=all
    on_all 'mkdir -p llm_jax && tar -xzf llm_jax.tar.gz -C llm_jax && cd llm_jax && sh launch/environment.sh .venv ".[tpu,gcs]"'
    rm -f "$archive"
}

run() {
    local line
    printf -v line '%q ' "$@"
    $dry_run || { mkdir -p "$(dirname "$saved")" && printf '%s\n' "$line" >"$saved"; }
    start "$line"
}

# On every host alike; setsid and nohup let it outlive the connection. run.pid is there while it runs, run.status after.
start() {
    local job='.venv/bin/python -m llm_jax.main "$@" & echo $! >run.pid; wait $!; echo $? >run.status; rm run.pid'
    on_all "cd llm_jax && rm -f run.status && (setsid nohup sh -c '$job' run $1 >run.log 2>&1 </dev/null &)"
}

resume() {
    local line now=READY
    [ -f "$saved" ] || fail "nothing was run under the name $name from this checkout ($saved is absent)"
    line=$(cat "$saved")
    $dry_run || now=$(state)
    case $now in
        READY) ;;
        ABSENT)
            create
            setup
            ;;
        *)
            delete
            create
            setup
            ;;
    esac
    stop
    start "$line"
}

# Waits until the state is saved.
stop() { on_all 'cd llm_jax && if [ -e run.pid ]; then xargs kill -TERM <run.pid; while [ -e run.pid ]; do sleep 1; done; fi'; }

delete() { do_it gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet; }

case $command in
    run)
        [ ${#arguments[@]} -gt 0 ] || fail "run needs the training command's arguments after --: -- --config=configs/pretrain.py ..."
        run "${arguments[@]}"
        ;;
    logs)
        do_it gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$worker" --command='tail -n 50 -F llm_jax/run.log'
        ;;
    status)
        do_it gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state,health)'
        on_all 'cd llm_jax && if [ -e run.pid ]; then echo running; else cat run.status 2>/dev/null || echo "not run yet"; fi'
        ;;
    *) "$command" ;;
esac

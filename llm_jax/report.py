"""`python -m llm_jax.report DIR... [--output=report.html]`: several runs on one page that needs no network."""

import sys

from llm_jax.base.door import run_door
from llm_jax.base.errors import UserError
from llm_jax.base.flags import read_flags

USAGE = """usage: python -m llm_jax.report DIR... [--output=report.html]

DIR...           workdirs of runs: done, interrupted, or still under way
--output=FILE    the page to write (report.html)

Curves of all runs over steps, tokens, time and flops; final metrics; the fields of their configurations that differ;
samples side by side. One file without a script, which opens anywhere."""


def main(argv: list[str]) -> None:
    if {"--help", "-h"} & set(argv):
        print(USAGE)
        return
    folders, output = parse(argv)

    from etils import epath

    from llm_jax.training.compare import compare

    target = epath.Path(output)
    if target.is_dir():
        raise UserError(f"--output={output} is a folder")
    page = compare(folders)
    try:
        target.write_text(page)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"--output={output}: {error.strerror}") from None
    print(f"wrote {output} ({len(folders)} run{'s' if len(folders) > 1 else ''}, {len(page.encode()) / 1e3:.0f} kB)")


def parse(argv: list[str]) -> tuple[list[str], str]:
    """The folders and the output. Raises UserError."""
    folders, given, _ = read_flags(argv, {"--output": "FILE"})
    if not folders:
        raise UserError("report takes one or more workdirs; see --help")
    return folders, given.get("--output", "report.html")


if __name__ == "__main__":
    sys.exit(run_door(main, sys.argv[1:]))

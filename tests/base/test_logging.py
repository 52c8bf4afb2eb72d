from llm_jax.base.logging import log, warn


def test_lines_go_to_stderr(capsys):
    log("step 1")
    warn("odd")
    captured = capsys.readouterr()
    assert captured.err == "step 1\nwarning: odd\n"
    assert captured.out == ""

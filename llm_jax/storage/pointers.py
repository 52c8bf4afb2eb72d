"""Git-LFS pointers: the three lines of text that a clone without `git lfs pull` has in place of a large file.

The format: github.com/git-lfs/git-lfs, docs/spec.md ("The first line is always the version").
"""

from etils import epath

from llm_jax.base.errors import UserError

START = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(file: epath.PathLike, content: bytes) -> None:
    """Raises UserError where a file's content, or its first 64 bytes, are those of a pointer."""
    if content.startswith(START):
        raise UserError(f"{file} is a git-LFS pointer, not the file itself: `git lfs pull` in its folder brings that")

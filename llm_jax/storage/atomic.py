"""Files that are there whole or not at all, for all whose existence means that something is finished."""

import os

from etils import epath

from llm_jax.storage.remote import is_remote


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file, replacing one that is there: a kill at any moment leaves the old file, or none, or all of it.

    Args:
        path: in a folder that exists. Beside it lies `NAME.new` meanwhile; object stores write whole objects anyway.
        content: text is written as UTF-8.
    """
    path = epath.Path(path)
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(data)
        return
    temporary = path.with_name(path.name + ".new")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            # Or a power cut could leave the new name on an empty file.
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

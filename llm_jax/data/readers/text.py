"""Text files, in pieces."""

from collections.abc import Iterator

from llm_jax.data.examples import Text
from llm_jax.data.readers.base import FileReader, Record
from llm_jax.data.readers.lines import decode_line, read_lines

# A text file is read in pieces of about this many bytes, cut after a blank line, or else at a line's end.
PIECE_BYTES = 16384


class TextFile(FileReader):
    """A file is one document; a long one comes in several pieces, which are its records."""

    suffixes = (".txt", ".md", ".rst", ".py")
    gzipped = True

    def records(self, start: int = 0) -> Iterator[Record]:
        for index, (first, lines, ends) in enumerate(self._pieces()):
            if index >= start:
                text = "".join(decode_line(self.file, first + i, line) for i, line in enumerate(lines))
                yield Record(f"{self.file}:{first}", Text(text, begins=index == 0, ends=ends))

    def count(self) -> int:
        return sum(1 for _ in self._pieces())

    def _pieces(self) -> Iterator[tuple[int, list[bytes], bool]]:
        """Number of the first line, lines, and whether the file ends with them."""
        lines: list[bytes] = []
        first, size = 1, 0
        for number, line in enumerate(read_lines(self.file), 1):
            if size >= 2 * PIECE_BYTES or (size >= PIECE_BYTES and not lines[-1].strip()):
                yield first, lines, False
                lines, first, size = [], number, 0
            lines.append(line)
            size += len(line)
        if lines:
            yield first, lines, True

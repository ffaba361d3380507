"""The lines of a foreign text file, with all that is needed to write it again to the byte."""

from pathlib import Path

from apportion.errors import InvalidInput


def content(path: Path) -> str:
    """The text of a file as it lies there; line ends are not translated.

    Raises:
        InvalidInput: the file cannot be read or is no UTF-8 text.
    """
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is no UTF-8 text: byte {error.start} is no character") from None


def lines(text: str, where: str) -> tuple[list[str], bool]:
    """The lines, and whether the last of them ends in a newline.

    Raises:
        InvalidInput: there is no line, a line is blank, or lines end in a carriage return.
    """
    if not text:
        raise InvalidInput(f"{where} is empty; it needs one line for each layer or block")
    trailing_newline = text.endswith("\n")
    found = text.removesuffix("\n").split("\n")
    for number, line in enumerate(found, 1):
        if not line.strip():
            raise InvalidInput(f"{where}, line {number} is blank; remove it")
        if "\r" in line:
            raise InvalidInput(
                f"{where}, line {number} holds a carriage return; lines end in a newline alone"
            )
    return found, trailing_newline

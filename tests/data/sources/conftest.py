"""Encoded images to put into folders, datasets and tar files."""

import io

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def encode():
    """The bytes of a PNG of one colour."""

    def encode(colour: str = "red", size: tuple[int, int] = (20, 16)) -> bytes:
        content = io.BytesIO()
        Image.new("RGB", size, colour).save(content, "PNG")
        return content.getvalue()

    return encode

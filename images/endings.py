"""Endings of image files: those that are read, and those of pictures that are not, with what to do then."""

from importlib.util import find_spec

HEIF = (".heic", ".heif", ".hif")
"""Photos of phones, which `pillow-heif` reads."""
HAS_HEIF = find_spec("pillow_heif") is not None

JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo")
SUFFIXES = frozenset(
    {".png", *JPEG, ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".avif", ".apng", *(HEIF if HAS_HEIF else ())}
)
"""Endings of image files, in small letters."""

INSTALL_HEIF = "pip install 'loraloom[heif]' reads them, or save them as JPEG"

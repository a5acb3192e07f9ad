"""The fixtures of the download tests."""

from tests.data.download_server import site, world  # noqa: F401

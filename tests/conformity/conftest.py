"""Fixtures of these tests."""

from tests.helpers.real_devices import device as device

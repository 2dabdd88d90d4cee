"""rclpy message classes behind `deqmpc.interface.MessageTypes`."""

from __future__ import annotations

import functools
import importlib
from typing import Any


@functools.cache
def message_class(type_name: str) -> type:
    """'nav_msgs/msg/Odometry' -> the class (also 'std_srvs/srv/Trigger')."""
    package, kind, name = type_name.split('/')
    return getattr(importlib.import_module(f'{package}.{kind}'), name)


class LiveTypes:
    """Makes messages that rclpy can publish."""

    def make(self, type_name: str, **fields: Any) -> Any:
        """A message; fields not given have rclpy's default."""
        return message_class(type_name)(**fields)

    def octet(self, value: int) -> bytes:
        """rclpy keeps a `byte` field as one byte."""
        return bytes([value])


TYPES = LiveTypes()

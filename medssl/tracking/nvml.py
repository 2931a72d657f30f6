"""NVIDIA's own counters, from the library that comes with its driver: nothing to install."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable

log = logging.getLogger(__name__)

_LIBRARY = "libnvidia-ml.so.1"
_OK = 0
_BYTES_PER_MEGABYTE = 1e6  # as MLflow counts


class _Memory(ctypes.Structure):
    """``nvmlMemory_t``."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong),
                ("used", ctypes.c_ulonglong))  # fmt: skip


class _Utilization(ctypes.Structure):
    """``nvmlUtilization_t``: percent of the last moments."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class Gpus:
    """The NVIDIA GPUs of this machine; none where there is no driver.

    Args:
        load: opens the driver's library; raises OSError where there is none.
    """

    def __init__(self, load: Callable[[str], ctypes.CDLL] = ctypes.CDLL) -> None:
        self._handles: list[ctypes.c_void_p] = []
        try:
            self._library = load(_LIBRARY)
        except OSError:
            return
        count = ctypes.c_uint()
        if self._library.nvmlInit_v2() != _OK:
            log.debug("The NVIDIA driver does not answer.")
            return
        self._library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        for number in range(count.value):
            handle = ctypes.c_void_p()
            if self._library.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(handle)) == _OK:
                self._handles.append(handle)

    def sample(self) -> dict[str, float]:
        """Return what each GPU says of itself, under MLflow's names; what it keeps is left out."""
        found: dict[str, float] = {}
        for number, handle in enumerate(self._handles):
            found |= {f"gpu_{number}_{name}": value for name, value in self._of(handle).items()}
        return found

    def _of(self, handle: ctypes.c_void_p) -> dict[str, float]:
        ask = self._library
        memory, busy = _Memory(), _Utilization()
        power, limit = ctypes.c_uint(), ctypes.c_uint()
        found: dict[str, float] = {}
        if ask.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == _OK and memory.total:
            found["memory_usage_megabytes"] = memory.used / _BYTES_PER_MEGABYTE
            found["memory_usage_percentage"] = 100 * memory.used / memory.total
        if ask.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(busy)) == _OK:
            found["utilization_percentage"] = float(busy.gpu)
        if ask.nvmlDeviceGetPowerUsage(handle, ctypes.byref(power)) == _OK:  # in mW
            found["power_usage_watts"] = power.value / 1000
            if ask.nvmlDeviceGetEnforcedPowerLimit(handle, ctypes.byref(limit)) == _OK:
                found["power_usage_percentage"] = 100 * power.value / max(limit.value, 1)
        return found

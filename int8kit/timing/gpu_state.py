"""State of the GPU while it works: clock, power, temperature, and the reasons for a lowered clock.

Read through NVML if its Python binding is installed (`pip install 'int8kit[tune]'`). Without it every value is None.
"""

from __future__ import annotations

from typing import Any

THROTTLE = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}


class Sensors:
    """The current CUDA device as NVML sees it. Never raises: a value that NVML does not give is None."""

    def __init__(self) -> None:
        self.driver: str | None = None
        self._nvml: Any = None
        try:
            import pynvml
            import torch

            pynvml.nvmlInit()
            self.driver = _text(pynvml.nvmlSystemGetDriverVersion())
            # NVML counts every GPU of the machine, torch only the visible ones: identify the GPU by its UUID
            uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._nvml = pynvml
        except Exception:  # no binding, no library, no permission: a benchmark needs none of them
            return

    def read(self) -> dict[str, Any] | None:
        """{"sm_mhz", "memory_mhz", "power_w", "temperature_c", "throttle": [reasons]} at this moment."""
        if self._nvml is None:
            return None
        nvml, handle = self._nvml, self._handle
        reasons = self._get(lambda: int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)))
        power = self._get(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000)
        return {
            "sm_mhz": self._get(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "memory_mhz": self._get(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            "power_w": None if power is None else round(power),
            "temperature_c": self._get(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "throttle": None if reasons is None else throttling(reasons),
        }

    def _get(self, ask: Any) -> Any:
        try:
            return ask()
        except Exception:  # not supported by this GPU or driver
            return None


def throttling(reasons: int) -> list[str]:
    """Names of NVML's throttle bits. An idle GPU and clocks that the user has set are not throttling."""
    return [name for bit, name in THROTTLE.items() if reasons & bit]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)

"""Videos decoded on the GPU of the process that runs the model, and in the sandbox where that does not do.

What is easy to break: a decoder process sees every file first, since what kills a parser must kill it there.
"""

import threading
from collections import Counter
from dataclasses import replace

from kinoray.config.shared import ClipConfig
from kinoray.errors import MediaError
from kinoray.video.frames import Frames, decode
from kinoray.video.nvdec import NotForNvdec, require_nvdec
from kinoray.video.request import Request
from kinoray.video.sandbox.pool import Sandbox

__all__ = ["DeviceDecoder"]


class DeviceDecoder:
    """`Sandbox.decode` for decode.device=cuda.

    Raises:
        ConfigError: no GPU, or no torchcodec.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        require_nvdec()
        self._sandbox = sandbox
        self._lock = threading.Lock()
        self._refused: Counter[str] = Counter()

    def take_refused(self) -> Counter[str]:
        """The readings since the last call that the sandbox did after all.

        They are counted by the reason of a NotForNvdec, or by the name of another MediaError.
        """
        with self._lock:
            refused, self._refused = self._refused, Counter()
        return refused

    def decode(self, data: bytes, request: Request, clip: ClipConfig) -> Frames:
        """As there, with the same frame numbers; colours differ by the 1 to 2 grey levels of another decoder.

        Raises:
            MediaError: neither can decode it.
        """
        on_cpu = replace(clip, decode=replace(clip.decode, device="cpu"))
        if not request.first_window:
            self._sandbox.probe(data, on_cpu.decode)
        try:
            return decode(data, request, clip)
        except MediaError as error:
            with self._lock:
                self._refused[error.reason if isinstance(error, NotForNvdec) else type(error).__name__] += 1
        return self._sandbox.decode(data, request, on_cpu)

"""A network behind HTTP with Ray Serve: send a video, get its classes.

    pip install 'kinoray[serve]' && cd deploy
    serve run serve:app checkpoint=../runs/first         # or i3d, torchvision:mvit_v2_s, s3://bucket/runs/first
    curl --data-binary @a.mp4 http://127.0.0.1:8000/     # {"label": "red", "score": 0.98, "top": [...], ...}

A video is decoded as in `kinoray label`: in a process that has given up network, files and privileges, under a deadline
and a memory limit. One that cannot be read is an answer with its reason (422) and harms no other. Each replica takes
one video at a time, so more replicas are more videos at once.
"""

import asyncio
import dataclasses
import tempfile

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

import kinoray

_MAX_BYTES = 512 * 2**20
_UPLOAD_S = 300.0  # that a video may take to arrive: a client that stops halfway must not keep a replica from others
_KEPT = (
    *("label", "score", "top", "abstained", "error_class", "error_text"),
    *("duration_s", "frames_corrupt", "frames_missing"),
)


@serve.deployment(max_ongoing_requests=4, max_queued_requests=64, ray_actor_options={"num_cpus": 1})
class Labels:
    """Answers with what the network says of the video in the request's body."""

    def __init__(self, checkpoint: str) -> None:
        self._model = kinoray.load(checkpoint)

    async def __call__(self, request: Request) -> JSONResponse:
        if request.method != "POST":
            return JSONResponse({"error": "send a video with POST"}, 405)
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:  # the name only says that it is one video
            try:
                async with asyncio.timeout(_UPLOAD_S):
                    async for chunk in request.stream():
                        file.write(chunk)
                        if file.tell() > _MAX_BYTES:
                            return JSONResponse({"error": f"a video has at most {_MAX_BYTES:,} bytes here"}, 413)
            except TimeoutError:
                return JSONResponse({"error": f"a video has {_UPLOAD_S:g} s to arrive here"}, 408)
            file.flush()
            said = await asyncio.to_thread(self._model.predict, file.name)
        answer = {name: value for name, value in dataclasses.asdict(said).items() if name in _KEPT}
        return JSONResponse(answer, 200 if said.status == "labelled" else 422)


def app(settings: dict[str, str]) -> serve.Application:
    """What `serve run serve:app checkpoint=...` builds."""
    return Labels.bind(settings["checkpoint"])

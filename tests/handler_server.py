"""Serves EndpointHandler over HTTP as Inference Endpoints does: `python handler_server.py FOLDER PORT`.

JSON becomes the handler's argument, other bodies {"inputs": bytes}; images come back as PNG, all else as JSON. Requests
are answered side by side, in threads.
"""

import asyncio
import io
import json
import sys
from typing import Any

import uvicorn
from PIL import Image

sys.path.insert(0, sys.argv[1])
from handler import EndpointHandler  # type: ignore[import-not-found]  # lies in FOLDER

handler = EndpointHandler(sys.argv[1])


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message.get("more_body", False)
    kind = dict(scope["headers"]).get(b"content-type", b"").split(b";")[0]
    if kind == b"application/json":
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as error:
            answer = {"error": f"the body must be JSON: {error}"}
        else:
            answer = await asyncio.to_thread(handler, request)
    else:
        answer = await asyncio.to_thread(handler, {"inputs": body})
    if isinstance(answer, Image.Image):
        buffer = io.BytesIO()
        answer.save(buffer, "PNG")
        content, kind = buffer.getvalue(), b"image/png"
    else:
        content, kind = json.dumps(answer).encode(), b"application/json"
    status = 400 if kind != b"image/png" and "error" in answer else 200
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
    await send({"type": "http.response.body", "body": content})


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")

"""A judge and a reward model for the contracts: both answer by a rule, on a real port, as long as the tests run."""

import json
import threading
import time

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from megatron_r1.reward.reward_model import SCORE_PATH


async def judge(request: Request) -> JSONResponse:
    """Correct if the answer holds a 5."""
    answer = (await request.json())["messages"][-1]["content"].rpartition("<answer>")[2].partition("</answer>")[0]
    verdict = {"analysis": answer, "correctness": "correct" if "5" in answer else "incorrect"}
    return JSONResponse({"choices": [{"message": {"content": json.dumps(verdict)}, "finish_reason": "stop"}]})


async def score(request: Request) -> JSONResponse:
    """The number of letters."""
    return JSONResponse({"scores": [float(len(text)) for text in (await request.json())["responses"]]})


async def alive(request: Request) -> JSONResponse:
    return JSONResponse({})


def serve() -> str:
    """Start the server, which ends with the process; its address."""
    routes = [Route("/v1/chat/completions", judge, methods=["POST"]), Route(SCORE_PATH, score, methods=["POST"])]
    routes += [Route("/health", alive), Route("/v1/models", alive)]
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), host="127.0.0.1", port=0, log_level="error"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


ADDRESS = serve()

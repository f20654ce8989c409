"""The endpoints of the server, as an ASGI application."""
import asyncio
import base64
import dataclasses
import hashlib
import hmac
import pathlib
import re
import time
import traceback

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from infer.answers import Choice, Writer, event_bytes, push_found
from infer.fields import Refusal
from infer.openapi import describe_api
from infer.protocol import Ask, Limits, fit_tokens, read_chat, read_completion, read_json
from infer.text import encode_prompt

MAX_BODY = 1 << 20  # Bytes.
BODY_S = 30.0  # For a body to arrive.
OPEN_PATHS = ("/", "/health")  # Need no key.
PAGE = pathlib.Path(__file__).with_name("page.html")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
  """A model, and what turns requests into what its engine takes.

  Attributes:
    make_request: (prompt ids, Sampling's fields, grammar or None, user, beams=BeamSearch's) -> the engine's
    Request.
    chat: data.chat.Chat, or None where the model has no template.
    grammars: infer.grammar.GrammarCompiler, or None: then no text is constrained.
    tools: names of functions -> infer.tools.CallReader, or None: then no tool is called.
    force_call: functions, one of which is to be called -> (ids that the answer begins with, their text, a
      grammar in Lark's notation of the rest), or None: then no call is forced.
    begins_with_bos: whether a text that is continued begins with the tokenizer's marker.
  """
  name: str
  tokenizer: object
  max_length: int
  make_request: object
  chat: object = None
  grammars: object = None
  tools: object = None
  force_call: object = None
  begins_with_bos: bool = True


class Api:
  """Usage: Api(served, worker, metrics, ...).app is the ASGI application."""

  def __init__(self, served: Served, worker, metrics, *, key: str | None = None, hosts: tuple[str, ...] = ()):
    """`hosts`: names in the Host header that are answered; () is all."""
    self._served, self._worker, self._metrics = served, worker, metrics
    self._key, self._hosts, self._created = key, hosts, int(time.time())
    self._limits = Limits(model=served.name, vocab_size=served.tokenizer.vocab_size,
                          max_length=served.max_length, max_requests=worker.most,
                          has_template=served.chat is not None)
    self._page, self._policy = read_page()
    self._description = describe_api(served.name)
    routes = {"/": self._show_page, "/health": self._tell_health, "/metrics": self._tell_metrics,
              "/openapi.json": self._tell_api, "/v1/models": self._list_models,
              "/v1/models/{name:path}": self._tell_model}
    posts = {"/v1/completions": self._complete, "/v1/chat/completions": self._chat,
             "/v1/embeddings": self._refuse_embeddings}
    self._paths = {*routes, *posts}
    self.app = self._guard(Starlette(
      routes=[Route(path, function) for path, function in routes.items()]
      + [Route(path, function, methods=["POST"]) for path, function in posts.items()],
      exception_handlers={Refusal: self._refuse, HTTPException: self._refuse_http,
                          ClientDisconnect: self._refuse_gone, Exception: self._refuse_fault}))

  # What every request goes through.

  def _guard(self, app):
    """Who may ask, by which name; the headers and the count of every answer; no exception gets out."""
    async def guarded(scope, receive, send):
      path = scope["path"] if scope["path"] in self._paths else "other"
      ended = False

      async def send_counted(message):
        nonlocal ended
        ended = message["type"] == "http.response.body" and not message.get("more_body")
        if message["type"] == "http.response.start":
          self._metrics.responses.labels(path, str(message["status"])).inc()
          message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff"),
                                (b"referrer-policy", b"no-referrer"), (b"cache-control", b"no-store")]
        await send(message)

      try:
        self._check_caller(Request(scope))
        await app(scope, receive, send_counted)
      except Refusal as e:
        await self._refuse(None, e)(scope, receive, send_counted)
      except Exception:
        if not ended:
          raise  # Closes the connection. What was answered by _refuse_fault is told.

    return guarded

  def _check_caller(self, request):
    host = re.sub(r":\d+$", "", request.headers.get("host", "")).lower()
    if self._hosts and host not in self._hosts:  # A page elsewhere whose name was made to mean this machine.
      raise Refusal(f"this server answers to {', '.join(self._hosts)} only", status=403, code="wrong_host")
    if self._key is None or request.url.path in OPEN_PATHS:
      return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key.encode()):
      raise Refusal("a key is needed: Authorization: Bearer KEY", status=401, code="invalid_api_key")

  def _refuse(self, _, refusal):
    self._metrics.errors.labels(refusal.code).inc()
    headers = {} if refusal.retry_after is None else {"retry-after": str(refusal.retry_after)}
    headers |= {"connection": "close"} if refusal.status in (408, 413) else {}  # Its body is not read.
    headers |= {"www-authenticate": "Bearer"} if refusal.status == 401 else {}
    return JSONResponse(refusal.as_json(), refusal.status, headers)

  def _refuse_http(self, request, e):
    what = {404: f"there is no {request.url.path[:200]}", 405: f"{request.method} is not for this path"}
    code = {404: "not_found", 405: "method_not_allowed"}.get(e.status_code, "bad_request")
    refusal = Refusal(what.get(e.status_code, e.detail), status=e.status_code, code=code)
    response = self._refuse(request, refusal)
    response.headers.update(e.headers or {})
    return response

  def _refuse_gone(self, request, _):
    return self._refuse(request, Refusal("the client closed the connection", status=499, code="client_gone"))

  def _refuse_fault(self, request, e):
    """Ours: the client is told no more than that."""
    traceback.print_exception(e)
    return self._refuse(request, Refusal("the server has a fault; its log says which", status=500,
                                         code="internal_error"))

  # Small answers.

  async def _show_page(self, request):
    return HTMLResponse(self._page, headers={"content-security-policy": self._policy})

  async def _tell_health(self, request):
    worker = self._worker
    state = "failed" if worker.fault is not None else worker.state
    told = {"status": state, "model": self._served.name, "open": worker.n_open,
            "engine_beat_age_s": round(worker.beat_age, 3)}
    if state != "ok":
      told["error"] = str(worker.refuse_state())
    return JSONResponse(told, 200 if state == "ok" else 503)

  async def _tell_metrics(self, request):
    return Response(self._metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

  async def _tell_api(self, request):
    return JSONResponse(self._description)

  def _describe_model(self):
    return {"id": self._served.name, "object": "model", "created": self._created, "owned_by": "assay",
            "max_length": self._served.max_length, "vocab_size": self._served.tokenizer.vocab_size,
            "has_chat_template": self._served.chat is not None}

  async def _list_models(self, request):
    return JSONResponse({"object": "list", "data": [self._describe_model()]})

  async def _tell_model(self, request):
    name = request.path_params["name"]
    if name != self._served.name:
      raise Refusal(f"model={name[:60]!r} is not served here; served: {self._served.name}", "model",
                    status=404, code="model_not_found")
    return JSONResponse(self._describe_model())

  async def _refuse_embeddings(self, request):
    raise Refusal("embeddings are not served: nothing has trained the hidden states of a decoder-only model "
                  "to be compared with each other", code="unsupported_endpoint")

  # Texts.

  async def _complete(self, request):
    return await self._answer(request, read_completion)

  async def _chat(self, request):
    return await self._answer(request, read_chat)

  async def _answer(self, request, read):
    ask = read(read_json(await read_body(request)), self._limits)
    prompts, requests, opening = await asyncio.to_thread(self._prepare, ask)
    return Answer(ask, self._served, prompts, requests, opening, self._worker, self._metrics)

  def _prepare(self, ask: Ask):
    """([ids of each prompt], [the engine's request for each text], what a forced call begins with).

    It takes its time: not on the loop's thread.
    """
    served = self._served
    has_calls = any("tool_calls" in m or m["role"] == "tool" for m in ask.messages)
    if (ask.tools or has_calls) and not served.tools:
      raise Refusal(f"tools are not served: nothing is known of how {served.name}'s template writes calls",
                    "tools", code="unsupported_parameter")
    if ask.constraint and served.grammars is None:
      raise Refusal(f"{ask.constraint[2]} is not served: llguidance is not installed", ask.constraint[2],
                    code="unsupported_parameter")
    forced, opening = [], ""
    if ask.tool_choice not in ("none", "auto"):
      ask, forced, opening = self._force_call(ask)
    requests, prompts, seeds = [], [], ask.seeds()
    for name, ids in self._encode(ask):
      prompts.append(ids := [*ids, *forced])
      settings = ask.settings | {"max_tokens": fit_tokens(ask, len(ids), self._limits, name)}
      if ask.beams:
        requests.append(served.make_request(ids, settings, None, ask.user, beams=ask.beams))
        continue
      requests += [served.make_request(ids, settings | {"seed": seed}, self._compile(ask), ask.user)
                   for seed in seeds]
    return prompts, requests, opening

  def _force_call(self, ask):
    """(`ask` with the grammar of a call, the ids that it begins with, their text)."""
    if self._served.force_call is None or self._served.grammars is None:
      raise Refusal(f"tool_choice={ask.tool_choice} is not served: no grammar is known of how "
                    f"{self._served.name}'s template writes calls", "tool_choice",
                    code="unsupported_parameter")
    functions = [tool["function"] for tool in ask.tools
                 if ask.tool_choice in ("required", tool["function"]["name"])]
    try:
      ids, opening, grammar = self._served.force_call(functions)
    except ValueError as e:
      raise Refusal(str(e), "tool_choice") from None
    return dataclasses.replace(ask, constraint=("lark", grammar, "tools")), ids, opening

  def _encode(self, ask):
    """(field, ids) of each prompt."""
    if ask.is_chat:
      tools = {"tools": list(ask.tools)} if ask.tools and ask.tool_choice != "none" else {}
      try:
        return [("messages", self._served.chat.encode(list(ask.messages), **tools))]
      except ValueError as e:
        raise Refusal(str(e), "messages") from None
    made = []
    for i, prompt in enumerate(ask.prompts):
      if isinstance(prompt, str):
        ids = encode_prompt(self._served.tokenizer, prompt)
        prompt = ids if self._served.begins_with_bos or len(ids) == 1 and prompt == "" else ids[1:]
      made.append(("prompt" if len(ask.prompts) == 1 else f"prompt[{i}]", prompt))
    return made

  def _compile(self, ask):
    if ask.constraint is None:
      return None
    kind, text, name = ask.constraint
    try:
      return self._served.grammars.compile(kind, text)
    except ValueError as e:
      raise Refusal(f"{name}: {str(e)[:500]}", name) from None


class Answer:
  """The answer to one request, as an ASGI application: it has the engine make the texts, and sends them."""

  def __init__(self, ask: Ask, served: Served, prompts, requests, opening, worker, metrics):
    self._ask, self._worker, self._requests, self._metrics = ask, worker, requests, metrics
    self._writer = Writer(ask, served.name, served.tokenizer)
    self._n_prompt = sum(map(len, prompts))
    names = {tool["function"]["name"] for tool in ask.tools}

    def calls():
      if not names or ask.tool_choice == "none":
        return None
      reader = served.tools(names)
      reader.push(opening)
      return reader

    self._choices = [
      Choice(ask, served.tokenizer, ids, served.tokenizer.decode(ids) if ask.echo else "", calls())
      for ids in prompts for _ in range(ask.n)]

  async def __call__(self, scope, receive, send):
    """Raises Refusal, before anything is sent: the engine does not take it, or does not finish it."""
    call = self._worker.submit(self._requests)
    watch = asyncio.create_task(_leave_when_gone(receive, call))
    try:
      await call.accepted
      if self._ask.stream:
        await self._send_events(call, send)
      else:
        async for _ in self._deltas(call):
          pass
        await JSONResponse(self._writer.whole(self._choices, self._n_prompt))(scope, receive, send)
    finally:
      watch.cancel()
      call.cancel()

  async def _deltas(self, call):
    """(index, Delta) by and by. Raises Refusal: the rest is not coming."""
    async for index, event in call:
      if self._ask.beams:
        push_found(self._choices[index * self._ask.n:], event)
        yield index, None
        continue
      choice = self._choices[index]
      if choice.stopped:
        continue
      delta = choice.push(event) if hasattr(event, "id") else choice.push_prompt(event)
      grammar = self._requests[index].grammar
      if event.finish == "stop" and grammar is not None and grammar.error is not None:
        raise Refusal(f"the text had to end before it was what was asked for: {grammar.error}", status=422,
                      code="grammar_failed")
      yield index, delta
      await asyncio.sleep(0)  # A backlog must not keep the loop from the news that its client is gone.
      if choice.stopped:
        call.cancel(index)

  async def _send_events(self, call, send):
    put = lambda body, more=True: send({"type": "http.response.body", "body": body, "more_body": more})
    await send({"type": "http.response.start", "status": 200, "headers": [
      (b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]})
    try:
      async for index, delta in self._deltas(call):
        if (chunk := self._writer.chunk(index, delta)) is not None:
          await put(event_bytes(chunk))
      if self._ask.include_usage:
        await put(event_bytes(self._writer.last(self._choices, self._n_prompt)))
      await put(event_bytes("[DONE]"), False)
    except Refusal as e:  # The status is out already: the stream ends with the error, and without [DONE].
      self._metrics.errors.labels(e.code).inc()
      await put(event_bytes(e.as_json()), False)


async def _leave_when_gone(receive, call):
  while (await receive())["type"] != "http.disconnect":
    pass
  call.leave()


async def read_body(request) -> bytes:
  """Raises Refusal: it is of another type, too large, or too slow."""
  kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
  if kind != "application/json":  # Browsers let any page send other types here.
    raise Refusal(f"Content-Type is {kind[:60] or 'missing'}: it must be application/json", status=415,
                  code="wrong_content_type")
  body = bytearray()
  try:
    async with asyncio.timeout(BODY_S):
      async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
          raise Refusal(f"the body is larger than {MAX_BODY} bytes", status=413, code="body_too_large")
  except TimeoutError:
    raise Refusal(f"the body was not there within {BODY_S:g} s", status=408, code="body_too_slow") from None
  return bytes(body)


def read_page() -> tuple[str, str]:
  """(the page, its Content-Security-Policy: what is in it, by hash, and requests to this server)."""
  page = PAGE.read_text(encoding="utf-8")
  def hashes(tag):
    for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL):
      yield f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
  return page, "; ".join([
    "default-src 'none'", f"script-src {' '.join(hashes('script'))}",
    f"style-src {' '.join(hashes('style'))}",
    "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"])

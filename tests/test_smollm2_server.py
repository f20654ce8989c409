"""The real server with real weights, as a process: the official client, structured texts, the page's own
numbers, those who leave, and the engine's death."""
import concurrent.futures
import json
import os
import re
import types

import httpx
import jsonschema
import numpy as np
import pytest

from infer.load import open_chat, open_run
from tests.real_engine import serving
from tests.smollm2 import run_folder
from tests.test_grammar import ARRAY, INTEGER, SCHEMAS, STRING, check_schema, closed
from tests.test_hub_real import models
from tests.test_page import SIZES, open_browser, opened, say, shoot  # noqa: F401

openai = pytest.importorskip("openai", reason="the client that the server is for")
pytestmark = pytest.mark.slow
FLAGS = "--name=smollm2", "--slots=16", "--max_length=1024", "--max_waiting=64"
TALK = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {"type": "function", "function": {
  "name": "get_weather", "description": "The weather of a town", "parameters": closed(
    town={"enum": ["Paris", "Lyon", "Nice"]}, days={**INTEGER, "minimum": 1, "maximum": 9})}}


@pytest.fixture(scope="module")
def server():
  with serving(run_folder(), *FLAGS) as (p, port, seconds, _):
    print(f"answers after {seconds:.1f} s")
    yield port
    assert p.poll() is None and gauge(port, "assay_pages_used") == 0


@pytest.fixture
def client(server):
  return client_of(server)


def client_of(port):
  return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0, timeout=900)


def gauge(port, name):
  told = httpx.get(f"http://127.0.0.1:{port}/metrics").text
  return float(re.search(rf"^{name} (\S+)$", told, re.MULTILINE)[1])


def test_a_second_start_takes_at_most_a_quarter_of_the_first(tmp_path):
  """From the command to the first answer of /health, with all programs of the usual settings. Before
  the others' server takes memory: what a virtual machine must ask its host for takes seconds each time.
  Told to end while its programs run for the first time, it does, without a crash."""
  env = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax"), "XLA_FLAGS": ""}
  seconds = []
  for _ in range(2):
    with serving(run_folder(), **env) as (p, port, took, said):
      assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
      p.terminate()
      assert p.wait(30) == 0, said
      seconds.append(took)
      print(f"{took:.1f} s; " + next(line for line in said if "compiled or loaded" in line).strip())
  assert seconds[1] <= 0.25 * seconds[0]


def test_a_chat_is_that_of_transformers(client):
  """The prompt, the probabilities of the first token, and the greedy text."""
  import torch
  _, model = models("SmolLM2-135M-Instruct")
  run = open_run(run_folder(), "--model")
  chat = open_chat(run)
  for text in ("What is the capital of France?", "Hello!", "Write a haiku about the sea."):
    talk = [{"role": "user", "content": text}]
    got = client.chat.completions.create(model="smollm2", messages=talk, max_tokens=24, temperature=0,
                                         logprobs=True, top_logprobs=20)
    prompt, entries = chat.encode(talk), got.choices[0].logprobs.content
    assert got.usage.prompt_tokens == len(prompt)
    with torch.no_grad():
      out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=2,
                           pad_token_id=2)
      logprobs_V = torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1], -1).numpy()
    made = [i for i in out[0, len(prompt):].tolist() if i != 2]
    assert got.choices[0].message.content == run.tokenizer.decode(made)
    np.testing.assert_allclose([t.logprob for t in entries[0].top_logprobs], np.sort(logprobs_V)[:-21:-1],
                               atol=2e-3)


def test_completions_and_streams(client):
  asked = dict(model="smollm2", prompt=["Once upon a time", "1, 2, 3, 4,"], max_tokens=16, seed=3, logprobs=2)
  whole = client.completions.create(**asked)
  assert [c.index for c in whole.choices] == [0, 1]
  assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
  chunks = [*client.completions.create(**asked, stream=True, stream_options={"include_usage": True})]
  assert chunks[-1].usage == whole.usage
  for choice in whole.choices:
    mine = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice.index]
    assert "".join(c.text for c in mine) == choice.text and mine[-1].finish_reason == choice.finish_reason
    n = len(choice.logprobs.tokens)
    assert n == len(choice.logprobs.token_logprobs) == len(choice.logprobs.top_logprobs) and n >= 1
    assert "".join(choice.logprobs.tokens) == choice.text
    assert all(-40 < p <= 0 for p in choice.logprobs.token_logprobs)
  asked = dict(model="smollm2", prompt="1, 2, 3, 4,", max_tokens=8, temperature=0)
  greedy, = client.completions.create(**asked).choices
  assert greedy.text.startswith(" 5, 6") and greedy.finish_reason == "length"


def test_seeds_stops_and_samples(client):
  make = lambda **more: [c.message.content for c in client.chat.completions.create(
    model="smollm2", messages=TALK, max_tokens=24, **more).choices]
  three = make(n=3, seed=40, temperature=1.3)
  assert three == [text for seed in (40, 41, 42) for text in make(seed=seed, temperature=1.3)]
  assert len(set(three)) > 1
  asked = dict(model="smollm2", messages=TALK, temperature=0)
  whole = client.chat.completions.create(**asked).choices[0]
  assert whole.message.content == "The capital of France is Paris." and whole.finish_reason == "stop"
  cut = client.chat.completions.create(**asked, stop=" is", logprobs=True)
  assert cut.choices[0].message.content == "The capital of France" and cut.choices[0].finish_reason == "stop"
  assert "".join(e.token for e in cut.choices[0].logprobs.content) == "The capital of France"
  chunks = [*client.chat.completions.create(**asked, stop=" is", stream=True)]
  assert "".join(c.choices[0].delta.content or "" for c in chunks) == "The capital of France"


def test_a_prompt_is_scored(client):
  asked = dict(model="smollm2", prompt="The capital of France is Paris", max_tokens=0, echo=True, logprobs=1)
  choice = client.completions.create(**asked).choices[0]
  assert choice.text == asked["prompt"] and choice.logprobs.token_logprobs[0] is None
  other = client.completions.create(**asked | {"prompt": "The capital of France is Lyon"}).choices[0]
  assert sum(choice.logprobs.token_logprobs[1:]) > sum(other.logprobs.token_logprobs[1:]) + 1


def test_errors_name_the_field(client):
  for more, field in (({"temperature": 3}, "temperature"), ({"max_tokens": 5000}, "max_tokens"),
                      ({"n": 10**9}, "n"), ({"extra_body": {"max_token": 3}}, "max_token"),
                      ({"logit_bias": {"99999": 1}}, "logit_bias"), ({"top_p": 0}, "top_p"),
                      ({"extra_body": {"chat_template": "x"}}, "chat_template"),
                      ({"response_format": {"type": "json_schema", "json_schema": {
                        "name": "x", "schema": {"type": "strin"}}}}, "response_format")):
    with pytest.raises(openai.BadRequestError) as e:
      client.chat.completions.create(model="smollm2", messages=TALK, **more)
    assert (e.value.param or "").startswith(field) and e.value.code, (more, e.value)
  with pytest.raises(openai.NotFoundError):
    client.chat.completions.create(model="gpt-4", messages=TALK)


def test_tools(client):
  asked = dict(model="smollm2", tools=[WEATHER], seed=0, messages=[
    {"role": "user", "content": "How is the weather in Nice?"}])
  named = {"type": "function", "function": {"name": "get_weather"}}
  for choice in ("required", named):
    made = client.chat.completions.create(**asked, tool_choice=choice, max_tokens=100).choices[0]
    call, = made.message.tool_calls
    assert made.finish_reason == "tool_calls" and call.function.name == "get_weather"
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
  chunks = [c.choices[0] for c in client.chat.completions.create(**asked, tool_choice=named, stream=True)]
  streamed = "".join(c.function.arguments for chunk in chunks for c in chunk.delta.tool_calls or ())
  assert streamed == call.function.arguments and chunks[-1].finish_reason == "tool_calls"
  told = asked["messages"] + [made.message.model_dump(exclude_none=True), {
    "role": "tool", "tool_call_id": call.id, "content": "sunny, 24 degrees"}]
  asked = asked | {"max_tokens": 40}
  after, = client.chat.completions.create(**asked | {"messages": told}, tool_choice="none").choices
  assert after.message.content and not after.message.tool_calls
  auto, = client.chat.completions.create(**asked).choices
  assert auto.message.content or auto.message.tool_calls


def bound(schema):
  """The schema, with a longest text of each integer and string."""
  if not isinstance(schema, dict):
    return [*map(bound, schema)] if isinstance(schema, list) else schema
  kept = "enum", "const", "examples"
  made = {key: value if key in kept else bound(value) for key, value in schema.items()}
  kind = schema.get("type", ())
  if "integer" in kind:
    made |= {"minimum": -999} if not made.keys() & {"minimum", "exclusiveMinimum"} else {}
    made |= {"maximum": 999} if not made.keys() & {"maximum", "exclusiveMaximum"} else {}
  if kind == "string" and not made.keys() & {"pattern", "format"}:
    made.setdefault("maxLength", 30)
  return made


def is_open(schema) -> bool:
  """Whether a text of it may be of any length: objects of any keys, schemas within themselves, digits behind
  a point."""
  if not isinstance(schema, dict):
    return isinstance(schema, list) and any(map(is_open, schema))
  return (schema.get("type") == "object" and schema.get("additionalProperties") is not False
          or schema.get("type") == "number" or schema.get("$ref") in ("#", "#/$defs/tree")
          or schema.get("format") in ("email", "hostname") or any(map(is_open, schema.values())))


COLOURS = {"enum": ["red", "green", "blue"]}
MORE = [
  closed(colour=COLOURS, size={**INTEGER, "minimum": 1, "maximum": 60}), {"enum": ["yes", "no", "perhaps"]},
  {**ARRAY, "minItems": 1, "maxItems": 2, "items": closed(name={**STRING, "maxLength": 12}, colour=COLOURS)},
  closed(a=closed(b=closed(c={"type": "boolean"}))),
  closed(day={**STRING, "format": "date"}, done={"type": "boolean"}),
  {"anyOf": [closed(ok={"const": True}), closed(ok={"const": False}, why={**STRING, "maxLength": 20})]},
  {**ARRAY, "prefixItems": [COLOURS, INTEGER, {"type": "null"}], "items": False, "minItems": 3},
  closed(unit={"enum": ["kg", "m"]}, amount={"enum": [0.5, 1.5, 2.5]}),
  {**STRING, "pattern": "^[A-Z]{3}-[0-9]{2}$"},
  {**ARRAY, "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3},
  closed(days={**ARRAY, "items": {**STRING, "format": "date"}, "minItems": 1, "maxItems": 2})]


def test_texts_of_fifty_schemas_are_valid(client):
  """Each ends by itself, too: no text can be longer than what it may have."""
  schemas = [bound(schema) for schema in [*SCHEMAS, *MORE] if not is_open(schema)]

  def make(i):
    schema = schemas[i]
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    talk = [{"role": "user", "content": f"Answer in JSON, and be brief: {json.dumps(schema)}"}]
    return client.chat.completions.create(model="smollm2", messages=talk, seed=i, temperature=0.7,
                                          max_tokens=400, response_format=form).choices[0]

  assert len(schemas) >= 50
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    made = [*pool.map(make, range(len(schemas)))]
  for schema, choice in zip(schemas, made):
    assert choice.finish_reason == "stop", (schema, choice.message.content)
    check_schema(schema, choice.message.content)
  print(f"{len(made)} texts of as many schemas, all valid")


# The page, and the end.

@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_holds_a_conversation(browser, server, client, size, scheme, tmp_path, monkeypatch):
  """Pictures are in SHOTS, or the test's folder."""
  monkeypatch.setenv("SHOTS", os.environ.get("SHOTS", str(tmp_path)))
  asked, wait = ("What is the capital of France?", "And what is that town known for?"), 120_000
  with opened(browser, types.SimpleNamespace(port=server), size, scheme) as page:
    if size == "phone":
      page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("60")
    shoot(page, "settings")
    if size == "phone":
      page.get_by_role("button", name="Done").click()
    said = page.locator(".assistant .said")
    for i, text in enumerate(asked):
      say(page, text)
      page.locator(".assistant .foot").nth(i).wait_for(timeout=wait)
    first, second = said.all_text_contents()
    assert first == "The capital of France is Paris." and len(second) > 20
    talk = [{"role": role, "content": text} for role, text in zip(
      ("user", "assistant", "user"), (asked[0], first, asked[1]))]
    same = client.chat.completions.create(model="smollm2", messages=talk, temperature=0, max_tokens=60)
    assert second == same.choices[0].message.content
    token = page.locator(".assistant .t").nth(5)  # " Paris", the likeliest by far.
    token.tap() if size == "phone" else token.hover()
    assert page.locator("#peek tr").count() == 5 and "Paris" in page.locator("#peek tr.on").inner_text()
    shoot(page, "peek")
    page.mouse.move(1, 1)
    page.get_by_role("button", name="Settings").click() if size == "phone" else None
    page.get_by_label("Shade what was unlikely").check()
    page.get_by_role("button", name="Done").click() if size == "phone" else None
    shoot(page, "shaded")

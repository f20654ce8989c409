"""/openapi.json: the API as OpenAPI 3.1 says such things, from the tables that requests are checked by."""
from infer.fields import CHAT, COMPLETION


def describe_api(model: str) -> dict:
  post = lambda about, fields, required: {
    "summary": about,
    "requestBody": {"required": True, "content": {"application/json": {"schema": {
      "type": "object", "properties": fields, "required": required, "additionalProperties": False}}}},
    "responses": {"200": {"description": "the texts; with stream, chunks of them and [DONE]", "content": {
      "application/json": {"schema": {"$ref": "#/components/schemas/Answer"}},
      "text/event-stream": {"schema": {"type": "string"}}}}, **_errors()}}
  get = lambda about, kind="application/json", schema=None, codes=(): {
    "summary": about,
    "responses": {"200": {"description": about, "content": {kind: {"schema": schema or {"type": "object"}}}},
                  **{code: {"description": about, "content": {kind: {"schema": {"type": "object"}}}}
                     for code in codes}, **_errors("401", "403", "404")}}
  text = {"type": "string"}
  return {
    "openapi": "3.1.0",
    "info": {"title": f"Assay, serving {model}", "version": "1", "description":
             "The OpenAI API for one model. Every parameter is served or refused by name; null is left out."},
    "paths": {
      "/v1/completions": {"post": post("Continue texts", COMPLETION, ["prompt"])},
      "/v1/chat/completions": {"post": post("Answer a conversation", CHAT, ["messages"])},
      "/v1/models": {"get": get("What is served")},
      "/v1/models/{name}": {"get": get("One model") | {"parameters": [
        {"name": "name", "in": "path", "required": True, "schema": text}]}},
      "/health": {"get": get("Whether requests are taken", codes=["503"])},
      "/metrics": {"get": get("For Prometheus", "text/plain", text)},
      "/": {"get": get("The chat page", "text/html", text)},
    },
    "components": {
      "schemas": {
        "Answer": {"type": "object", "required": ["id", "object", "created", "model", "choices", "usage"],
                   "properties": {"id": text, "object": text, "created": {"type": "integer"}, "model": text,
                                  "choices": {"type": "array", "items": {"type": "object"}},
                                  "usage": {"type": "object"}}},
        "Error": {"type": "object", "required": ["error"], "properties": {"error": {
          "type": "object", "required": ["message", "type", "param", "code"], "properties": {
            "message": text, "type": text, "param": {"type": ["string", "null"]}, "code": text}}}}},
      "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
  }


def _errors(*codes):
  content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
  return {code: {"description": "refused: error.param names the field", "content": content} for code in (
    codes or ("400", "401", "403", "404", "408", "413", "415", "422", "429", "500", "503", "504"))}

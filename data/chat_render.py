"""The process that renders chat templates: JSON lines in, JSON lines out, nothing else within reach.

A template is a program that somebody else wrote. Jinja's sandbox keeps it from Python's objects; what it may
use of time and memory only the operating system can limit, so it runs here, under data.chat.Renderer, and may
be killed.
"""
import datetime
import json
import resource
import signal
import sys

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

MEMORY = 1 << 29  # Bytes of address space.


class Generation(jinja2.ext.Extension):
  """{% generation %} marks what a model is trained on; it renders as what it holds."""
  tags = {"generation"}

  def parse(self, parser):
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message):
  raise jinja2.TemplateError(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                    sort_keys=sort_keys)


def make_environment():
  """What templates of published models expect, as transformers' apply_chat_template gives it."""
  env = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
  env.filters["tojson"] = to_json
  env.globals["raise_exception"] = refuse
  env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
  return env


def render(env, template: str, values: list[dict], max_chars: int) -> list[str]:
  program, texts = env.from_string(template), []
  for each in values:
    parts, size = [], 0
    for part in program.generate(**each):
      parts.append(part)
      size += len(part)
      if size > max_chars:
        raise jinja2.TemplateError(f"it writes more than {max_chars} characters")
    texts.append("".join(parts))
  return texts


def main():
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  env = make_environment()
  for line in sys.stdin:
    request = json.loads(line)
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # Its signal ends the process.
    try:
      reply = {"texts": render(env, request["template"], request["values"], request["max_chars"])}
    except MemoryError:
      reply = {"error": f"it needs more than {MEMORY >> 20} MB"}
    except RecursionError:
      reply = {"error": "it calls itself without end"}
    except Exception as e:  # Whatever a template can raise is the template's fault.
      line = f"line {e.lineno}: " if isinstance(e, jinja2.TemplateSyntaxError) else ""
      reply = {"error": f"{line}{type(e).__name__}: {str(e)[:500]}"}
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps(reply), flush=True)


if __name__ == "__main__":
  main()

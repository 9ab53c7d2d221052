"""A model behind an OpenAI-compatible `/chat/completions`: a judge, or what rewrites responses."""

from typing import Any

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_r1.config.section import Section


class ChatEndpointSection(Section):
    """Where the model is, how it samples, and what is done when it fails."""

    url: str
    """Base address, as OpenAI's clients take it: `http://127.0.0.1:8000/v1`."""
    model: str
    """The name that the endpoint knows it by."""
    api_key_env: str | None = None
    """Environment variable that holds the key; None = no key is sent."""
    temperature: NonNegativeFloat = 0.0
    max_tokens: PositiveInt = 2048
    """Longest answer, tokens; one that is cut there counts as a failure."""
    json_schema: bool = True
    """Constrain answers by their JSON schema (`response_format`). False for an endpoint that cannot: the answer is then
    only checked."""
    extra: dict[str, Any] = {}
    """More keys of each request, such as `{ chat_template_kwargs = { enable_thinking = false } }`."""
    timeout: PositiveFloat = 120.0
    """Seconds one answer may take."""
    retries: NonNegativeInt = 3
    """Times that a question is asked again after nonsense, a time-out, or HTTP 408, 409, 429 or 5xx."""
    backoff: PositiveFloat = 1.0
    """Seconds before the first retry, doubled at each further one, times a random factor from 0.5 to 1.5."""
    max_concurrency: PositiveInt = 32
    """Requests in flight at once."""
    give_up_after: PositiveInt = 64
    """Questions in a row that fail in spite of their retries, after which the run stops."""


class PromptedEndpointSection(ChatEndpointSection):
    """An endpoint with the prompt that it is asked by."""

    prompt: str | None = None
    """A TOML file with `user`, and `system` if wanted (docs/judges.md); None = the one of the package."""

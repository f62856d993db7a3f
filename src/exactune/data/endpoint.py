"""Chat completions from any server that speaks OpenAI's protocol: a hosted one, vLLM, or llama.cpp's own on this machine."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from exactune.errors import ConfigError, DataError

RETRIED = (408, 409, 429, 500, 502, 503, 504)  # what passes: overload, rate limits, a restart
LONGEST_WAIT = 30.0  # seconds


@dataclass(frozen=True)
class Reply:
    """What the server said, and the tokens that it counted (0 where it does not tell)."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Endpoint:
    """`base_url` as in OpenAI's clients, such as `http://localhost:8080/v1`. `timeout` and waits are in seconds."""

    base_url: str
    model: str
    api_key: str | None = None
    timeout: float = 120.0
    tries: int = 5
    first_wait: float = 1.0

    def chat(self, messages: list[dict[str, str]], **settings: Any) -> Reply:
        """One completion of `messages`; `settings` go into the request (temperature, max_tokens, seed).

        Raises:
            ConfigError: the server refuses the request, or is not there.
            DataError: what it answers is not in the protocol.
        """
        body = json.dumps({"model": self.model, "messages": messages, **settings}).encode()
        for attempt in range(1, self.tries + 1):
            try:
                return _read(self._post(body))
            except urllib.error.HTTPError as error:
                said = error.read().decode(errors="replace")[:300]
                if error.code not in RETRIED or attempt == self.tries:
                    raise ConfigError(f"{self.base_url} answers {error.code}: {said}", "Check the model's name and the key.") from error
                wait = _asked_wait(error) or self.first_wait * 2 ** (attempt - 1)
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                if attempt == self.tries:
                    reason = getattr(error, "reason", error)
                    raise ConfigError(f"{self.base_url} cannot be reached: {reason}.", "Start the server, or check the address.") from error
                wait = self.first_wait * 2 ** (attempt - 1)
            time.sleep(min(wait, LONGEST_WAIT))
        raise AssertionError("the last try returns or raises")

    def _post(self, body: bytes) -> bytes:
        address = f"{self.base_url.rstrip('/')}/chat/completions"
        if not address.startswith(("http://", "https://")):
            raise ConfigError(f"{self.base_url} is no address of a server.", "It begins with http:// or https://.")
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.api_key}"} if self.api_key else {})}
        request = urllib.request.Request(address, data=body, headers=headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            return response.read()


def _asked_wait(error: urllib.error.HTTPError) -> float:
    """Seconds that the server asks to wait; 0 where it does not say."""
    try:
        return float(error.headers.get("Retry-After", 0))
    except ValueError:
        return 0.0


def _read(answer: bytes) -> Reply:
    try:
        said = json.loads(answer)
        usage = said.get("usage") or {}
        text = said["choices"][0]["message"]["content"]
        return Reply(text or "", int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(
            f"The server's answer is no chat completion: {answer[:200].decode(errors='replace')!r}.", "Give the address that ends in /v1."
        ) from error

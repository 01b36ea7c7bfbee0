"""Who asks: keys, compared in constant time; a job is there for the key alone that it was made with."""

import hashlib
import hmac
from collections.abc import Sequence
from typing import Final

from frameloom.serve.api.errors import ApiError
from frameloom.serve.config import LOCAL, Key

EVERYBODY: Final = Key(name=LOCAL, priority=100)
"""Where no keys are asked for."""


class Doorkeeper:
    """Knows the keys. `keys` may be replaced while the server runs; without any, everybody is let in."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self.keys = tuple(keys)

    def caller(self, authorization: str | None) -> Key:
        """Whose key an Authorization header has. Raises ApiError 401."""
        if not self.keys:
            return EVERYBODY
        scheme, _, secret = (authorization or "").partition(" ")
        given = hashlib.sha256(secret.strip().encode("latin-1")).digest()
        # All are compared, so that the time does not tell which one, or how much of it, was right.
        found = [key for key in self.keys if hmac.compare_digest(key.digest, given)]
        if scheme.lower() != "bearer" or not found:
            lack = "that key is not known" if authorization else "a key is needed"
            raise ApiError(
                401,
                "invalid_api_key",
                f"{lack}; send 'Authorization: Bearer KEY' with a key of this server",
                headers={"www-authenticate": "Bearer"},
            )
        return found[0]

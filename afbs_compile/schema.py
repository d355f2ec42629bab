"""Of which schema is a policy document, and what did older ones lack?"""

from typing import Any

from afbs_compile import strict_json

SCHEMA = 3
NEWS: dict[str, dict[str, Any]] = {  # fields that older schemas lack, with what they mean by it
    "tunings": {"kl": None, "perplexity_increase": None},
    "sites": {"weights": None},
    "heads": {"budget": None},
}


def unwrapped(document: Any) -> Any:
    """The policy part of a document of our schema or an older one, else ValueError."""
    if not isinstance(document, dict) or document.keys() != {"schema", "policy"}:
        raise strict_json.mismatch("", document, "an object with `schema` and `policy`")
    schema = document["schema"]
    if type(schema) is not int or not schema >= 1:
        raise strict_json.mismatch("schema", schema, f"1 to {SCHEMA}")
    if schema > SCHEMA:
        raise ValueError(f"schema is {schema}, this version reads {SCHEMA}: update afbs-compile")
    return with_news(document["policy"]) if schema < SCHEMA else document["policy"]


def with_news(value: Any, kind: str = "") -> Any:
    """A document of an older schema with the fields that it lacks.

    What is wrong with it otherwise is told when it is decoded.
    """
    if isinstance(value, list):
        return [with_news(item, kind) for item in value]
    if not isinstance(value, dict):
        return value
    if kind == "sites":  # by name
        return {name: with_news(site, "site") for name, site in value.items()}
    known = NEWS["sites"] if kind == "site" else NEWS.get(kind, {})
    found = known | {name: with_news(item, name) for name, item in value.items()}
    return rebucketed(found) if kind == "tunings" else found


def rebucketed(tuning: dict[str, Any]) -> dict[str, Any]:
    """A tuning in today's bucket, if it is in that of the time when they were powers of two."""
    from afbs_compile.policy import bucket_of

    length, bucket = tuning.get("length"), tuning.get("bucket")
    if type(length) is not int or length < 1 or bucket != 1 << (length - 1).bit_length():
        return tuning
    return tuning | {"bucket": bucket_of(length)}

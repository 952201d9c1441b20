"""Which JSON schemas can be enforced while a reply is written; the others are refused by name.

    enforceable({"type": "array", "uniqueItems": True})   # InputError: ... uniqueItems at /uniqueItems

Structured output promises that a finished reply is valid, so a keyword that the grammar engine
(llguidance 1.9) ignores or cannot express must not pass in silence. The tables below were found by
experiment; `tests/infer/test_schema_gate.py` repeats it. What passes is made safe: `oneOf` whose
branches cannot hold together becomes `anyOf`, integers stay within 18 digits, references that lead
nowhere or only to themselves are refused. The meaning never widens: every document that the result
allows is valid for the schema as given. Left out: anything outside the document (`$ref` to a URL,
`$anchor`), and whether a `pattern` can match at all (the grammar engine says so when it compiles).
"""

import difflib
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from herdling.errors import InputError
from herdling.infer.schema_facts import (
    CALENDAR,
    SHAPES,
    any_json,
    bound,
    constants,
    escape,
    kinds,
    number,
    stands_alone,
    types_of,
    writable,
)

ONE = ("items", "additionalProperties")
SEVERAL = ("anyOf", "oneOf", "allOf", "prefixItems")
NAMED = ("properties", "patternProperties", "$defs", "definitions")
ENFORCED = {
    *(ONE + SEVERAL + NAMED),
    *("type", "enum", "const", "$ref", "required", "minProperties", "maxProperties"),
    *("minItems", "maxItems", "minLength", "maxLength", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
ANNOTATIONS = {
    *("title", "description", "default", "examples", "example", "$comment", "$schema", "$id", "id"),
    *("deprecated", "readOnly", "writeOnly", "discriminator", "externalDocs", "xml", "nullable"),
}
REFUSED = {
    *("uniqueItems", "contains", "minContains", "maxContains", "additionalItems"),
    *("not", "if", "then", "else", "dependentSchemas", "dependentRequired", "dependencies"),
    *("propertyNames", "unevaluatedProperties", "unevaluatedItems", "x-guidance"),
    *("contentEncoding", "contentMediaType", "contentSchema", "extends", "disallow"),
    *("$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor"),
}
FORMATS = {
    *("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"),
}

ANY = "#/$defs/any-json"
"""Where a strict schema keeps what stands for `true`: any JSON, with bounds on its numbers."""
MOST_BYTES = 2**18
"""Largest schema, as JSON."""
DEEPEST = 64
"""Levels of nesting."""
MOST_OPTIONAL = 256
"""Optional properties of one object; the grammar engine gives up at some 500."""


def enforceable(schema: Any, *, strict: bool = False, where: str = "json_schema") -> dict[str, Any]:
    """The schema in a form that the grammar engine enforces entirely.

    `strict` narrows it as suits a tool's arguments: objects that list their properties take no
    others, and all numbers have bounds. Raises InputError naming keyword and JSON path.
    """
    if isinstance(schema, bool):
        schema = {} if schema else _refuse(where, "false", "", "nothing is valid for it")
    if not isinstance(schema, Mapping):
        raise InputError(f"{where} is {type(schema).__name__}; give a JSON object")
    try:
        text = json.dumps(schema, allow_nan=False)
        if len(text) > MOST_BYTES:
            raise InputError(f"{where} has {len(text)} bytes; at most {MOST_BYTES} are taken")
        root = json.loads(text, parse_float=number)
        gate = _Gate(root, strict and stands_alone(root), strict, where)
        made = gate.walk(root, "", closable=True)
        gate.check_references()
        if f'"{ANY}"' in json.dumps(made):
            made["$defs"] = {**made.get("$defs", {}), ANY.removeprefix("#/$defs/"): any_json(ANY)}
        return made
    except RecursionError:
        raise InputError(f"{where} nests more than {DEEPEST} levels deep") from None
    except (ValueError, TypeError) as problem:
        raise InputError(f"{where} is not JSON: {problem}") from None


def _refuse(where: str, keyword: str, path: str, why: str) -> NoReturn:
    raise InputError(f"{where}: {keyword} at {path or '/'} cannot be enforced: {why}")


class _Gate:
    """One schema on its way through."""

    def __init__(self, root: dict[str, Any], close: bool, bound: bool, where: str) -> None:
        self.root, self.close, self.bound, self.where = root, close, bound, where
        self.visited: dict[str, Any] = {}
        self.references: dict[str, str] = {}
        """Place of a `$ref` -> the path it points to."""

    def refuse(self, keyword: str, path: str, why: str) -> NoReturn:
        _refuse(self.where, keyword, path, why)

    def walk(self, node: Any, path: str, closable: bool) -> Any:
        """The subschema at a JSON path, checked and made safe; a `$ref` is not followed here."""
        self.visited[path] = node
        if isinstance(node, bool):
            return {"$ref": ANY} if node and self.bound else node
        if not isinstance(node, dict):
            raise InputError(
                f"{self.where}: {path or '/'} is no schema; give an object or a boolean"
            )
        if path.count("/") > DEEPEST:
            raise InputError(f"{self.where} nests more than {DEEPEST} levels deep at {path}")
        self.check_keywords(node, path)
        alone = not set(node) & {"properties", "required", "$ref", "additionalProperties"}
        made: dict[str, Any] = {}
        for key, value in node.items():
            inner = f"{path}/{key}"
            if key in ONE:
                made[key] = self.walk(value, inner, closable)
            elif key in SEVERAL:
                inside = closable and (key == "prefixItems" or alone)
                parts = [self.walk(v, f"{inner}/{i}", inside) for i, v in enumerate(value)]
                if key == "oneOf":
                    self.check_one_of(value, path)
                    key, parts = (
                        ("allOf", [{"anyOf": parts}]) if "anyOf" in node else ("anyOf", parts)
                    )
                made[key] = [*made.get(key, []), *parts]
            elif key in NAMED:
                made[key] = {
                    name: self.walk(v, f"{inner}/{escape(name)}", closable)
                    for name, v in value.items()
                }
            elif key in ENFORCED:
                made[key] = value
        return self.narrow(made, closable)

    def check_keywords(self, node: dict[str, Any], path: str) -> None:
        for key, value in node.items():
            at = f"{path}/{key}"
            if key == "uniqueItems" and value is False:
                continue
            if key in REFUSED or (key in ("$id", "id") and path and isinstance(value, str)):
                self.refuse(key, at, "remove it, or check the reply yourself")
            if key not in ENFORCED | ANNOTATIONS and not key.startswith("x-"):
                near = difflib.get_close_matches(key, ENFORCED | REFUSED, 1, 0.85)
                if near:
                    self.refuse(key, at, f"it is unknown; is it meant to be {near[0]}?")
            if key in SEVERAL and not (isinstance(value, list) and value):
                self.refuse(key, at, "it must be a list of schemas, and not empty")
            if key in NAMED and not isinstance(value, dict):
                self.refuse(key, at, "it must be an object of schemas")
        self.check_values(node, path)
        if "$ref" in node:
            self.reference(node["$ref"], path)

    def check_values(self, node: dict[str, Any], path: str) -> None:
        for key, value in node.items():
            if key in SHAPES and not SHAPES[key][0](value):
                self.refuse(key, f"{path}/{key}", f"it must be {SHAPES[key][1]}")
        types, required = types_of(node), node.get("required", [])
        if "format" in node and "string" in types and node["format"] not in FORMATS:
            known = ", ".join(sorted(FORMATS))
            self.refuse("format", f"{path}/format", f"{node['format']!r} is none of {known}")
        for key in ("enum", "const"):
            if key in node and not writable(node[key]):
                self.refuse(key, f"{path}/{key}", "it holds a control character")
        # Keys outside `properties` may come twice, and count once.
        if node.get("minProperties", 0) > max(1, len(set(required))):
            self.refuse("minProperties", f"{path}/minProperties", "name the keys in required")
        if len(node.get("properties", {}).keys() - set(required)) > MOST_OPTIONAL:
            why = f"at most {MOST_OPTIONAL} may be optional"
            self.refuse("properties", f"{path}/properties", why)

    def reference(self, target: Any, path: str) -> None:
        if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
            self.refuse("$ref", f"{path}/$ref", f"{target!r} is outside; point to #/$defs/...")
        self.references[path] = target[1:]

    def check_references(self) -> None:
        """Every `$ref` leads to a schema, and some finite document is valid for each."""
        for path, target in self.references.items():
            if target not in self.visited:
                self.refuse("$ref", f"{path}/$ref", f"there is no schema at #{target}")
        finite = {path for path, node in self.visited.items() if isinstance(node, bool)}
        while True:  # the least fixed point: what ends, given what is known to end
            more = {p for p in self.visited if p not in finite and self.ends(p, finite)}
            if not more:
                break
            finite |= more
        for path in self.references:
            if path not in finite:
                self.refuse("$ref", f"{path}/$ref", "it leads back to itself without an end")

    def ends(self, path: str, finite: set[str]) -> bool:
        """Whether the schema at `path` has a finite document, going by the parts that have one."""
        node = self.visited[path]
        if path in self.references and self.references[path] not in finite:
            return False
        if not all(f"{path}/allOf/{i}" in finite for i in range(len(node.get("allOf", [])))):
            return False
        for key in ("anyOf", "oneOf"):
            if key in node and not any(
                f"{path}/{key}/{i}" in finite for i in range(len(node[key]))
            ):
                return False
        types = set(types_of(node))
        if "const" in node or "enum" in node or types - {"object", "array"}:
            return True
        return any(self.kind_ends(kind, node, path, finite) for kind in types)

    def kind_ends(self, kind: str, node: dict[str, Any], path: str, finite: set[str]) -> bool:
        if kind == "array":
            first = len(node.get("prefixItems", []))
            least = node.get("minItems", 0)
            parts = [f"{path}/prefixItems/{i}" for i in range(min(first, least))]
            if least > first and "items" in node:
                parts.append(f"{path}/items")
        else:
            named = node.get("properties", {})
            needed = node.get("required", [])
            parts = [f"{path}/properties/{escape(name)}" for name in needed if name in named]
        return all(part in finite for part in parts)

    def check_one_of(self, branches: list[Any], path: str) -> None:
        """No two branches may hold for one document: then `oneOf` and `anyOf` are the same."""
        views = [self.resolved(branch) for branch in branches]
        for i, left in enumerate(views):
            for j in range(i):
                if not self.apart(left, views[j]):
                    why = (
                        f"its branches {j} and {i} may both hold; tell them apart by type or by a "
                    )
                    self.refuse("oneOf", f"{path}/oneOf", why + "required constant, or use anyOf")

    def resolved(self, node: Any) -> dict[str, Any]:
        """What a branch says at its top, with a plain `$ref` followed."""
        for _ in range(DEEPEST):
            if not isinstance(node, dict) or "$ref" not in node:
                break
            node = self.lookup(node["$ref"])
        return node if isinstance(node, dict) else {}

    def lookup(self, target: Any) -> Any:
        node: Any = self.root
        for step in str(target).split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            node = node.get(key) if isinstance(node, dict) else None
        return node

    def apart(self, a: dict[str, Any], b: dict[str, Any]) -> bool:
        """Whether no document can be valid for both: other types, other constants, another tag."""
        if not kinds(a) & kinds(b):
            return True
        mine, other = constants(a), constants(b)
        if mine is not None and other is not None:
            return not mine & other
        if types_of(a) != ["object"] or types_of(b) != ["object"]:
            return False
        for name in set(a.get("required", [])) & set(b.get("required", [])):
            tags = [constants(self.resolved(x.get("properties", {}).get(name))) for x in (a, b)]
            if None not in tags and not set.intersection(*filter(None, tags)):
                return True
        return False

    def narrow(self, made: dict[str, Any], closable: bool) -> dict[str, Any]:
        types = types_of(made) if "type" in made else []
        free = not made.keys() & {*SEVERAL, "$ref"}
        listed = "properties" in made and set(made.get("required", [])) <= made["properties"].keys()
        if self.close and closable and free and listed and "patternProperties" not in made:
            made.setdefault("additionalProperties", False)
        if self.bound and free:
            if not made:
                return {"$ref": ANY}
            for kind, key in (("object", "additionalProperties"), ("array", "items")):
                if kind in types:
                    made.setdefault(key, {"$ref": ANY})
        if "integer" in types or (self.bound and "number" in types):
            bound(made)
        if made.get("format") in CALENDAR:
            more = [{"pattern": pattern} for pattern in CALENDAR[made["format"]]]
            made["allOf"] = [*made.get("allOf", []), *more]
        return made

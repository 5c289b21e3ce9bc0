"""The OpenAPI document is true: its examples validate and run."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter

from int8qa.contract import Precision
from int8qa.gateway import schemas
from int8qa.gateway.problems import PROBLEMS
from tests.gateway.fakes import FakeEngine, Service, open_service

BODIES = [
    value
    for value in vars(schemas).values()
    if isinstance(value, type)
    and issubclass(value, BaseModel)
    and value.model_config.get("json_schema_extra")
]


@pytest.mark.parametrize("model", BODIES, ids=lambda model: model.__name__)
def test_examples_validate(model: type[BaseModel]):
    """Every example in a schema is an instance of it."""
    examples = model.model_config["json_schema_extra"]["examples"]
    assert examples
    for example in examples:
        model.model_validate(example)


def test_example_answer_is_a_span_of_the_example_context():
    """The offsets in the documentation are right."""
    (example,) = schemas.AnswerResponse.model_config["json_schema_extra"]["examples"]
    answer = example["answer"]
    assert schemas.EXAMPLE_CONTEXT[answer["start"] : answer["end"]] == answer["text"]


async def test_documented_requests_run(tokenizer):
    """Each request example of the document is answered as documented."""
    engine = FakeEngine(
        tokenizer, phrases=dict.fromkeys(Precision, ("Ingrid Sørensen",))
    )
    async with open_service(tokenizer, engine=engine) as one:
        document = (await one.client.get("/openapi.json")).json()
        asked = 0
        for path, operations in document["paths"].items():
            if "post" not in operations:
                continue
            operation = operations["post"]
            reference = operation["requestBody"]["content"]["application/json"]
            schema = resolve(document, reference["schema"])
            answer_schema = operation["responses"]["200"]["content"]["application/json"]
            for example in schema["examples"]:
                url = path.replace("{model_id}", "acme/minilm-test")
                response = await one.client.post(url, json=example)
                assert response.status_code == 200, response.text
                check_reply(answer_schema["schema"], response.json())
                asked += 1
    assert asked == 5


def resolve(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    name = schema["$ref"].rpartition("/")[2]
    resolved: dict[str, Any] = document["components"]["schemas"][name]
    return resolved


def check_reply(schema: dict[str, Any], reply: Any) -> None:
    if "anyOf" in schema:
        kind = schemas.HfAnswer | list[schemas.HfAnswer]
        TypeAdapter(kind).validate_python(reply)
    else:
        model = getattr(schemas, schema["$ref"].rpartition("/")[2])
        model.model_validate(reply)


async def test_references_resolve_and_errors_are_documented(service: Service):
    """No reference dangles, and each answering route documents every status."""
    document = (await service.client.get("/openapi.json")).json()
    known = document["components"]["schemas"]
    text = json.dumps(document)
    for part in text.split('"#/components/schemas/')[1:]:
        assert part.partition('"')[0] in known
    statuses = {str(kind.status) for kind in PROBLEMS.values()} - {"500", "404"}
    for path in ("/v1/answer", "/v1/answers", "/", "/models/{model_id}"):
        responses = document["paths"][path]["post"]["responses"]
        assert responses.keys() >= statuses | {"200", "400", "415"}
        assert "HTTPValidationError" not in json.dumps(responses)


async def test_document_holds_this_services_limits(tokenizer):
    """Limits that settings decide, and the precisions that are loaded, are shown."""
    async with open_service(
        tokenizer,
        precisions=[Precision.INT8],
        limits={"max_context_chars": 777, "max_items": 9},
    ) as one:
        document = (await one.client.get("/openapi.json")).json()
    fields = document["components"]["schemas"]["AnswerRequest"]["properties"]
    assert fields["context"]["maxLength"] == 777
    assert fields["precision"]["anyOf"][0]["enum"] == ["int8"]
    items = document["components"]["schemas"]["BatchRequest"]["properties"]["items"]
    assert items["maxItems"] == 9


async def test_document_names_the_default_precision(tokenizer):
    """What a request that names no precision gets is said wherever one may be named."""
    async with open_service(tokenizer, recommended=Precision.FP16) as one:
        document = (await one.client.get("/openapi.json")).json()
    precision = document["components"]["schemas"]["AnswerRequest"]["properties"][
        "precision"
    ]
    assert precision["default"] == "fp16"
    assert precision["description"].endswith(": fp16 here")
    described = [
        parameter["description"]
        for operations in document["paths"].values()
        for parameter in operations.get("post", {}).get("parameters", [])
        if parameter["name"] == "precision"
    ]
    assert len(described) == 2
    assert all(text.endswith("the default is fp16 here") for text in described)


async def test_every_field_is_described(service: Service):
    """Each field of a request has a description and, if a number, its bounds."""
    document = (await service.client.get("/openapi.json")).json()
    for name in ("AnswerRequest", "HfInputs", "HfParameters", "BatchRequest"):
        fields = document["components"]["schemas"][name]["properties"]
        for field, schema in fields.items():
            assert schema.get("description"), f"{name}.{field}"
            for kind in (schema, *schema.get("anyOf", [])):
                if kind.get("type") == "integer":
                    assert {"minimum", "maximum"} <= kind.keys(), f"{name}.{field}"


async def test_docs_page_is_served_without_a_cdn(service: Service):
    """/docs renders the document, with scripts and styles of our own."""
    response = await service.client.get("/docs")
    assert response.status_code == 200
    assert "/openapi.json" in response.text
    assert "//cdn" not in response.text
    assets = re.findall(r'(?:src|href)="([^"]+)"', response.text)
    assert len(assets) >= 2
    for asset in assets:
        assert (await service.client.get(asset)).status_code == 200, asset

"""The service keeps to its own description: requests are drawn from it, right ones and wrong ones."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as draw
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import CHECKS
from schemathesis.core.parameters import ParameterLocation
from schemathesis.generation import GenerationMode
from test_serve import ADMIN, KEY, png

from eurosat_mlops.bundle import read_bundle
from eurosat_mlops.core import Settings
from eurosat_mlops.engine import Engine, open_model
from eurosat_mlops.journal import open_journal
from eurosat_mlops.problems import ServeConfig, hash_key
from eurosat_mlops.serve import make_app

EXAMPLES = 20  # for each operation


@pytest.fixture(scope="module")
def described(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    "The description, read from the application that is asked; some of the images drawn are golden tiles."
    place = tmp_path_factory.mktemp("described")
    config = Settings(place, models_dir=place / "models")
    engine = Engine(config, open_model(bundle_folder, config), threads=2)
    app = make_app(ServeConfig(keys=(hash_key(KEY),)), engine, open_journal(str(place / "journal.db")))
    tiles = [png(tile) for tile in read_bundle(bundle_folder).reference["golden_tiles"]]
    images = draw.sampled_from(tiles) | draw.binary(max_size=100)
    schemathesis.openapi.media_type("image/*", images)
    schemathesis.openapi.format("binary", images)
    yield schemathesis.openapi.from_asgi("/openapi.json", app)
    asyncio.run(app.state.service.close())


CALM = settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_every_answer_is_as_described(described: Any, mode: GenerationMode) -> None:
    "No error of ours; statuses, content types, forms and headers as documented; what is wrong is refused."
    asked = 0
    for operation in (found.ok() for found in described.get_all_operations()):

        @CALM
        @given(operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            head = case.meta.components.get(ParameterLocation.HEADER)
            keyless = head is not None and head.mode.is_negative  # it is the key that is wrong: let it be
            skipped = [CHECKS.get_one("positive_data_acceptance")]
            case.call_and_validate(headers={} if keyless else ADMIN, excluded_checks=skipped)

        with contextlib.suppress(Unsatisfiable):  # nothing about it can be wrong
            ask()
        asked += 1
    assert asked > 20


def test_the_examples_of_the_description_are_as_it_says(described: Any) -> None:
    "Those of requests and of answers; and no form is left open."
    document = described.raw_schema
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    bodies = [operation["requestBody"] for operation in operations if "requestBody" in operation]
    answers = [answer for operation in operations for answer in operation["responses"].values()]
    contents = [content for part in bodies + answers for content in part.get("content", {}).values()]
    assert len(contents) > 100 and all(content["schema"] for content in contents)
    examples = [content for content in contents if "example" in content]
    assert len(examples) >= 8
    for content in examples:
        schema = content["schema"] | {"components": document["components"]}
        jsonschema.Draft202012Validator(schema).validate(content["example"])

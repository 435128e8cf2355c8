"""All that is fuzzed."""

from tests.fuzz.kind import Kind
from tests.fuzz.of_data import Cache, Columns, Images, Prepare, Source
from tests.fuzz.of_models import Load, Lora, Model, SingleFile
from tests.fuzz.of_runs import Log, Run
from tests.fuzz.of_settings import Toml, Words

KINDS: tuple[type[Kind], ...] = (
    Toml, Words, Model, Load, SingleFile, Lora, Run, Log, Cache, Prepare, Source, Columns, Images,
)  # fmt: skip

"""A local stand-in of Vertex AI and Cloud Storage, reached over real HTTP by the real clients. See README.md."""

from tests.vertex_world.faults import Faults
from tests.vertex_world.language_model import Distribution, LanguageModel, SyntheticModel, exact_kl
from tests.vertex_world.models import MODELS, ModelSpec
from tests.vertex_world.sampling import sample_responses, write_response_files
from tests.vertex_world.wire import canonical_request_hash
from tests.vertex_world.world import VertexWorld

__all__ = [
    "MODELS",
    "Distribution",
    "Faults",
    "LanguageModel",
    "ModelSpec",
    "SyntheticModel",
    "VertexWorld",
    "canonical_request_hash",
    "exact_kl",
    "sample_responses",
    "write_response_files",
]

"""Files of responses that are there already."""

from pathlib import Path

import pytest

from backends.errors import ConfigError
from flows.config.reading import validate
from flows.config.sampling import SampleConfig
from flows.sample import sample


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"prompt": "Hi"}', '{"responses": 3}'])
def test_a_file_in_the_way_that_holds_no_responses_is_named_and_kept(tmp_path: Path, content: str) -> None:
    file = tmp_path / "000_hi.json"
    file.write_text(content)
    values = {"backend": "local", "model1": "smollm2-135m", "output_dir": tmp_path, "prompts": ["Hi"]}
    with pytest.raises(ConfigError, match=r"000_hi\.json is no file of responses .*\. Choose another output_dir"):
        sample.fn(validate(SampleConfig, values))
    assert file.read_text() == content

"""What looks like a secret is not recorded."""

from __future__ import annotations

import pytest

from lightning_gpuorch.telemetry.command_line import command_line


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["predict.py", "--api-key", "abc", "--devices", "2"], "predict.py --api-key '***' --devices 2"),
        (["predict.py", "--hf_token=abc"], "predict.py '--hf_token=***'"),
        (["predict.py", "model.PASSWORD=a=b", "x"], "predict.py 'model.PASSWORD=***' x"),
        (["predict.py", "--aws-secret-access-key", "abc"], "predict.py --aws-secret-access-key '***'"),
        (["predict.py", "--use-token", "--devices", "2"], "predict.py --use-token --devices 2"),
        (["predict.py", "--url", "postgres://me:abc@db/x"], "predict.py --url 'postgres://me:***@db/x'"),
        # No secrets.
        (["predict.py", "--max-batch-tokens", "1024"], "predict.py --max-batch-tokens 1024"),
        (["predict.py", "--tokenizer", "bert"], "predict.py --tokenizer bert"),
        (["secret_santa.py", "a b"], "secret_santa.py 'a b'"),
    ],
)
def test_values_of_secrets_are_left_out(arguments: list[str], shown: str) -> None:
    assert command_line(arguments) == shown

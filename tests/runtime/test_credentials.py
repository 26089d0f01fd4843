import pytest

from pipelines.runtime.command import refuse_credentials
from pipelines.runtime.errors import InputError

SECRET = "wJalrXUtnFEMI"


@pytest.mark.parametrize(
    "address",
    [
        f"s3://AKIA123:{SECRET}@bucket/corpus",
        f"s3://bucket/corpus?region=eu-west-1&secret_key={SECRET}",
        f"abfs://account:{SECRET}@container/x",
        f"https://host/file.parquet?X-Amz-Signature={SECRET}",
        f"gs://bucket/x?access_token={SECRET}",
    ],
)
def test_an_address_with_credentials_is_refused_without_being_repeated(address):
    with pytest.raises(InputError, match="--corpus holds credentials") as found:
        refuse_credentials({"output": "s3://bucket/out", "corpus": address})
    assert SECRET not in str(found.value)


def test_addresses_in_lists_are_looked_at_too():
    with pytest.raises(InputError, match="--adapters"):
        refuse_credentials({"adapters": ("a", f"s3://u:{SECRET}@bucket/b")})


def test_ordinary_settings_pass():
    refuse_credentials(
        {
            "corpus": "s3://bucket/a@b/part-*.parquet",
            "output": "s3://bucket/out?endpoint_override=localhost:9000&scheme=http",
            "max_tokens": 256,
            "model": "Qwen/Qwen3-0.6B",
            "prompt": 'Of "{text}" at https://user@host: one word?',
            "keep_columns": ("token", "secret"),
        }
    )

"""How many examples are tried: some in the suite, thousands with `pytest tests/fuzz --hypothesis-profile=long`."""

from hypothesis import HealthCheck, settings

# An example that takes longer is as good as a hang for its user; all of them take a small part of it.
_SECONDS = 60
_COMMON = settings(
    deadline=1000 * _SECONDS,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    # The suite tries the same examples each time, whatever was found before.
    database=None,
    print_blob=True,
)
settings.register_profile("suite", _COMMON, max_examples=40, derandomize=True)
settings.register_profile("long", _COMMON, max_examples=1000)
# Hypothesis' own choices; --hypothesis-profile is read after this file.
if settings.get_current_profile_name() in ("default", "ci"):
    settings.load_profile("suite")

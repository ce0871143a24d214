"""How many examples are tried: some in the suite, thousands with `pytest tests/fuzz --hypothesis-profile=long`."""

from hypothesis import HealthCheck, settings

_COMMON = settings(
    # Hypothesis would measure wall time, which depends on what else the machine does; support.py bounds CPU time.
    deadline=None,
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

"""Runs a test method that asks for `variant` over the `variants` its class names."""


def pytest_generate_tests(metafunc):
    if "variant" in metafunc.fixturenames and getattr(metafunc.cls, "variants", None):
        metafunc.parametrize("variant", metafunc.cls.variants)

"""Registers the fixtures that tests share."""

pytest_plugins = [
    "mounted",
    "beside",
    "proving_ground",
    "places",
    "command_line",
    "web_server",
    "store_parts",
    "stores",
    "shared_rows",
]

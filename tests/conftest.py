"""Registers the fixtures that tests share."""

pytest_plugins = ["mounted", "command_line", "web_server"]

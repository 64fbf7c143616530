"""The process that serves one mount: parts put together, signals, commands, readiness."""

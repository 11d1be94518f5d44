"""The same policies inside real engines. Importing one of its modules imports the engine's own."""

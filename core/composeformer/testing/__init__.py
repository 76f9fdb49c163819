"""What tests of plugins need: strategies of specs. Needs hypothesis; nothing else of composeformer imports it."""

"""The laws, a module for each slot, and those of every slot and of whole models."""

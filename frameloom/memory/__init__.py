"""Where memory goes: predicted before anything is computed."""

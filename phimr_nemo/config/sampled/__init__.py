"""Settings of the stages that train on responses of their own."""

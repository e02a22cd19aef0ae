"""The comparison of full-system and user-mode emulation: what is measured, how it is counted, how it is shown."""

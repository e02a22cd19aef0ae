"""Build ARM container images on ordinary x86 hosts in a full virtual machine."""

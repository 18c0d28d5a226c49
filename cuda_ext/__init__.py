"""cuda_ext: the runtime's own torch operators. Import `cuda_ext.ops`; importing loads nothing."""

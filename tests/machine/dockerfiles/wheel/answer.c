#include <Python.h>

static PyObject *get(PyObject *self, PyObject *none) { return PyLong_FromLong(42); }

static PyMethodDef methods[] = {{"get", get, METH_NOARGS, NULL}, {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "answer", NULL, -1, methods};

PyMODINIT_FUNC PyInit_answer(void) { return PyModule_Create(&module); }

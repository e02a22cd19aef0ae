#include <stdio.h>

#include "answer.h"

int main(void) { return printf("%d\n", answer()) < 0; }

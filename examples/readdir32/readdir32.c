/* Lists a folder the way a 32-bit program does that was built without large files: off_t and d_off have 32 bits.
 * Such programs are many, and old ones cannot be built again. Under qemu-user they meet the 64-bit host's kernel,
 * whose ext4 gives each entry a 64-bit place, and readdir fails with EOVERFLOW. */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>

_Static_assert(sizeof(off_t) == 4, "build it with 32-bit off_t: -D_FILE_OFFSET_BITS=32 -U_TIME_BITS");

int main(int argc, char **argv) {
    const char *folder = argc > 1 ? argv[1] : ".";
    DIR *open_folder = opendir(folder);
    if (open_folder == NULL) {
        perror(folder);
        return 2;
    }
    int count = 0;
    errno = 0;
    while (readdir(open_folder) != NULL) {
        count++;
        errno = 0;
    }
    printf("%s: %d entries, errno %d (%s)\n", folder, count, errno, errno == 0 ? "no error" : strerror(errno));
    return errno == 0 ? 0 : 1;
}

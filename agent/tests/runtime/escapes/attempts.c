/*
 * Ways out of a container, tried one after the other: each in a process of its own, each answered by one line,
 * "NAME refused ERRNO", "NAME killed SIGNAL" or "NAME SUCCEEDED".
 *
 * Calls that would harm the machine get arguments that the kernel refuses in another way (EINVAL and the like): the right
 * answer to them is EPERM or ENOSYS, before anybody looked at the arguments.
 *
 * Arguments: the pid of a process outside, a file outside, an abstract socket outside, the major and minor number of a disk.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static int outside_pid;
static const char *outside_file, *outside_socket;
static unsigned disk_major, disk_minor;

/* 0 when an attempt failed as it should (errno says how), anything else when it got through. */
typedef int (*attempt)(void);

static int got(long result) { return result >= 0; }

/* For calls with senseless arguments: any other answer means that the call itself was allowed. */
static int allowed(long result) {
    return result >= 0 || (errno != EPERM && errno != ENOSYS);
}

/* --- file systems and namespaces --- */

static int mount_tmpfs(void) { return got(mount("t", "/tmp", "tmpfs", 0, "")); }
static int mount_proc(void) { return got(mount("p", "/tmp", "proc", 0, "")); }
static int mount_bind(void) { return got(mount("/", "/tmp", 0, MS_BIND | MS_REC, 0)); }
static int mount_disk(void) { return got(mount("/dev/sda", "/tmp", "ext4", MS_RDONLY, 0)); }
static int mount_cgroup(void) { return got(mount("c", "/tmp", "cgroup", 0, "memory")); }
static int mount_cgroup2(void) { return got(mount("c", "/tmp", "cgroup2", 0, 0)); }
static int mount_overlay(void) { return got(mount("o", "/tmp", "overlay", 0, "lowerdir=/bin:/etc")); }
static int mount_debugfs(void) { return got(mount("d", "/tmp", "debugfs", 0, 0)); }
static int remount_root(void) { return got(mount(0, "/", 0, MS_REMOUNT | MS_BIND, 0)); }
static int remount_proc_sys(void) { return got(mount(0, "/proc/sys", 0, MS_REMOUNT | MS_BIND, 0)); }
static int unmask_kcore(void) { return got(umount2("/proc/kcore", MNT_DETACH)); }
static int unmask_proc_sys(void) { return got(umount2("/proc/sys", MNT_DETACH)); }
static int share_root(void) { return got(mount(0, "/", 0, MS_SHARED | MS_REC, 0)); }
static int pivot(void) { return allowed(syscall(SYS_pivot_root, "/nowhere", "/nowhere")); }
static int new_open_tree(void) { return allowed(syscall(428, AT_FDCWD, "/", 1)); }
static int new_move_mount(void) { return allowed(syscall(429, -1, "", -1, "", 4)); }
static int new_fsopen(void) { return allowed(syscall(430, "tmpfs", 0)); }
static int new_fsconfig(void) { return allowed(syscall(431, -1, 0, 0, 0, 0)); }
static int new_fsmount(void) { return allowed(syscall(432, -1, 0, 0)); }
static int new_fspick(void) { return allowed(syscall(433, AT_FDCWD, "/", 0)); }
static int new_mount_setattr(void) { return allowed(syscall(442, AT_FDCWD, "/", 0, 0, 0)); }
static int change_root(void) { return got(chroot("/tmp")); }
static int unshare_user(void) { return got(unshare(CLONE_NEWUSER)); }
static int unshare_mount(void) { return got(unshare(CLONE_NEWNS)); }
static int unshare_net(void) { return got(unshare(CLONE_NEWNET)); }
static int unshare_pid(void) { return got(unshare(CLONE_NEWPID)); }
static int unshare_cgroup(void) { return got(unshare(CLONE_NEWCGROUP)); }

static int clone_with(long flags) {
    long pid = syscall(SYS_clone, flags | SIGCHLD, 0, 0, 0, 0);
    if (pid == 0) _exit(0);
    return got(pid);
}
static int clone_user(void) { return clone_with(CLONE_NEWUSER); }
static int clone_user_mount(void) { return clone_with(CLONE_NEWUSER | CLONE_NEWNS); }
static int clone_mount(void) { return clone_with(CLONE_NEWNS); }
static int clone_three(void) {
    uint64_t arguments[11] = {CLONE_NEWUSER, 0, 0, 0, SIGCHLD};
    long pid = syscall(435, arguments, sizeof arguments);
    if (pid == 0) _exit(0);
    return got(pid);
}

static int enter(const char *kind, int type) {
    char path[64];
    snprintf(path, sizeof path, "/proc/1/ns/%s", kind);
    int fd = open(path, O_RDONLY);
    if (fd < 0) fd = open("/proc/self/ns/mnt", O_RDONLY);
    return fd < 0 ? 0 : allowed(setns(fd, type));
}
static int setns_mount(void) { return enter("mnt", CLONE_NEWNS); }
static int setns_user(void) { return enter("user", CLONE_NEWUSER); }
static int setns_net(void) { return enter("net", CLONE_NEWNET); }
static int setns_pidfd(void) { return allowed(setns(syscall(434, 1, 0), CLONE_NEWNS)); }

/* Goes through every descriptor that can be seen, from here or in /proc, for one that leads out. */
static int leads_out(int fd) {
    char path[512];
    struct stat status;
    snprintf(path, sizeof path, "../../../../../../../../../../../..%s", outside_file);
    return faccessat(fd, path, F_OK, 0) == 0 || fstatat(fd, path, &status, 0) == 0;
}
static int leaked_descriptors(void) {
    for (int fd = 3; fd < 1024; fd++)
        if (fcntl(fd, F_GETFD) >= 0) return 1;
    return 0;
}
static int for_each_process(const char *what, int (*look)(const char *path)) {
    DIR *processes = opendir("/proc");
    int found = 0;
    for (struct dirent *entry; processes && (entry = readdir(processes));) {
        char path[320];
        if (entry->d_name[0] < '1' || entry->d_name[0] > '9') continue;
        snprintf(path, sizeof path, "/proc/%s/%s", entry->d_name, what);
        found |= look(path);
    }
    closedir(processes);
    return found;
}
static int dir_leads_out(const char *path) {
    DIR *fds = opendir(path);
    int found = 0;
    for (struct dirent *entry; fds && (entry = readdir(fds));) {
        int fd = openat(dirfd(fds), entry->d_name, O_PATH);
        if (fd >= 0) found |= leads_out(fd), close(fd);
    }
    if (fds) closedir(fds);
    return found;
}
static int descriptors_of_others(void) { return for_each_process("fd", dir_leads_out); }
static int path_leads_out(const char *path) {
    int fd = open(path, O_PATH);
    int found = fd >= 0 && leads_out(fd);
    if (fd >= 0) close(fd);
    return found;
}
static int roots_of_others(void) { return for_each_process("root", path_leads_out); }
static int directories_of_others(void) { return for_each_process("cwd", path_leads_out); }
static int above_the_root(void) { return access(outside_file, F_OK) == 0 || path_leads_out("/"); }

static int is_writable(const char *path) {
    int fd = open(path, O_WRONLY);
    if (fd < 0) fd = open(path, O_RDWR | O_APPEND);
    if (fd < 0) {
        int readable = open(path, O_RDONLY);
        char own[64];
        snprintf(own, sizeof own, "/proc/self/fd/%d", readable);
        if (readable >= 0) fd = open(own, O_WRONLY);
        if (readable >= 0 && fd < 0 && errno != ETXTBSY && truncate(own, 1) == 0) return 1;
    }
    return fd >= 0;
}
static int overwrite_programs(void) { return for_each_process("exe", is_writable); }

static int handle_of_root(void) {
    struct { struct file_handle head; unsigned char bytes[128]; } handle = {{.handle_bytes = 128}};
    int id, dir = open("/", O_RDONLY);
    if (name_to_handle_at(AT_FDCWD, "/", &handle.head, &id, 0) < 0) {
        /* The root of ext4, as the "shocker" had it. */
        uint32_t inode[2] = {2, 0};
        handle.head.handle_bytes = 8, handle.head.handle_type = 1;
        memcpy(handle.bytes, inode, 8);
    }
    return allowed(open_by_handle_at(dir, &handle.head, O_RDONLY));
}

/* --- devices --- */

static int node(mode_t kind, unsigned major, unsigned minor) {
    unlink("/tmp/node");
    int made = mknod("/tmp/node", kind | 0666, makedev(major, minor));
    return made == 0 && open("/tmp/node", O_RDONLY) >= 0;
}
static int device_disk(void) { return node(S_IFBLK, disk_major, disk_minor); }
static int device_memory(void) { return node(S_IFCHR, 1, 1); }
static int device_kmsg(void) { return node(S_IFCHR, 1, 11); }
static int device_tun(void) { return node(S_IFCHR, 10, 200); }
static int device_console(void) { return node(S_IFCHR, 5, 1); }
static int device_of_image(void) { return got(open("/node-of-image", O_RDONLY)); }
static int device_of_volume(void) { return got(open("/volume/node", O_RDONLY)); }
static int device_existing(void) {
    const char *names[] = {"/dev/mem", "/dev/kmem", "/dev/port", "/dev/kmsg", "/dev/sda", "/dev/vda", "/dev/kvm",
                           "/dev/fuse", "/dev/net/tun", "/dev/loop-control", "/dev/console", "/dev/watchdog"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (open(names[i], O_RDONLY) >= 0) return 1;
    return 0;
}
static int terminal_injection(void) { return got(ioctl(0, TIOCSTI, "x")); }
static int io_ports(void) {
#ifdef SYS_iopl
    return allowed(syscall(SYS_iopl, 7));
#else
    errno = ENOSYS;
    return 0;
#endif
}

/* --- the kernel's own files --- */

static int writes(const char *path, const char *text) {
    int fd = open(path, O_WRONLY);
    return fd >= 0 && write(fd, text, strlen(text)) > 0;
}
static int core_pattern(void) { return writes("/proc/sys/kernel/core_pattern", "|/tmp/evil"); }
static int modprobe(void) { return writes("/proc/sys/kernel/modprobe", "/tmp/evil"); }
static int kernel_panic(void) { return writes("/proc/sys/kernel/panic", "77"); }
static int host_name_file(void) { return writes("/proc/sys/kernel/hostname", "evil"); }
static int overcommit(void) { return writes("/proc/sys/vm/overcommit_memory", "1"); }
static int binfmt(void) { return writes("/proc/sys/fs/binfmt_misc/register", ":x:M::evil::/tmp/evil:"); }
static int sysrq(void) { return writes("/proc/sysrq-trigger", "h"); }
static int irq(void) { return writes("/proc/irq/default_smp_affinity", "1"); }
static int uevent_helper(void) { return writes("/sys/kernel/uevent_helper", "/tmp/evil"); }
static int uevent(void) { return writes("/sys/class/mem/null/uevent", "change"); }
static int power_state(void) { return writes("/sys/power/state", "x"); }
static int release_agent(void) {
    const char *paths[] = {"/sys/fs/cgroup/memory/release_agent", "/sys/fs/cgroup/release_agent",
                           "/sys/fs/cgroup/rdma/release_agent", "/sys/fs/cgroup/cpu/release_agent",
                           "/sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/unified/cgroup.procs"};
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++)
        if (writes(paths[i], "/tmp/evil")) return 1;
    return got(mkdir("/sys/fs/cgroup/evil", 0755));
}
static int less_likely_to_be_killed(void) { return writes("/proc/self/oom_score_adj", "-1000"); }
static int own_id_map(void) { return writes("/proc/self/uid_map", "0 0 4294967295"); }
static int reads(const char *path) {
    char byte;
    int fd = open(path, O_RDONLY);
    return fd >= 0 && read(fd, &byte, 1) == 1;
}
static int read_kcore(void) { return reads("/proc/kcore"); }
static int read_kmsg(void) { return reads("/proc/kmsg"); }
static int read_keys(void) { return reads("/proc/keys"); }
static int read_timers(void) { return reads("/proc/timer_list"); }
static int read_interrupts(void) { return reads("/proc/interrupts"); }
static int read_firmware(void) {
    DIR *dir = opendir("/sys/firmware");
    int count = 0;
    while (dir && readdir(dir)) count++;
    return count > 2;
}

/* --- system calls that belong to the device --- */

#define CALL(name, ...) static int name(void) { return allowed(syscall(__VA_ARGS__)); }
CALL(call_keyctl, SYS_keyctl, 0, -5, 1)
CALL(call_add_key, SYS_add_key, "user", "evil", "x", 1, -3)
CALL(call_request_key, SYS_request_key, "user", "evil", 0, -3)
CALL(call_bpf, SYS_bpf, 0, 0, 0)
CALL(call_perf, SYS_perf_event_open, 0, 0, -1, -1, 0)
CALL(call_userfaultfd, SYS_userfaultfd, 0)
CALL(call_io_uring_setup, 425, 1, 0)
CALL(call_io_uring_enter, 426, -1, 0, 0, 0, 0, 0)
CALL(call_init_module, SYS_init_module, 0, 0, "")
CALL(call_finit_module, SYS_finit_module, -1, "", 0)
CALL(call_delete_module, SYS_delete_module, "no-such-module", 0)
CALL(call_kexec, SYS_kexec_load, 0, 0, 0, ~0L)
CALL(call_reboot, SYS_reboot, 1, 2, 3, 0)
CALL(call_swapon, SYS_swapon, "/nowhere", 0)
CALL(call_settimeofday, SYS_settimeofday, 0, 1)
CALL(call_clock_settime, SYS_clock_settime, 0, 0)
CALL(call_sethostname, SYS_sethostname, "evil", 4)
CALL(call_setdomainname, SYS_setdomainname, "evil", 4)
CALL(call_acct, SYS_acct, "/nowhere")
CALL(call_quotactl, SYS_quotactl, 0, 0, 0, 0)
CALL(call_syslog, SYS_syslog, 3, 0, 0)
CALL(call_vhangup, SYS_vhangup)
CALL(call_kcmp, SYS_kcmp, 1, 1, 0, 0, 0)
CALL(call_fanotify_init, SYS_fanotify_init, 0, 0)
CALL(call_move_pages, SYS_move_pages, 1, 0, 0, 0, 0, 0)
CALL(call_pidfd_getfd, 438, -1, 0, 0)
CALL(call_process_madvise, 440, -1, 0, 0, 0, 0)
CALL(call_lookup_dcookie, SYS_lookup_dcookie, 0, 0, 0)
CALL(call_unknown, 5000, 0)

static int socket_of(int family, int kind, int protocol) { return got(socket(family, kind, protocol)); }
static int socket_packet(void) { return socket_of(AF_PACKET, SOCK_RAW, 0x300); }
static int socket_raw(void) { return socket_of(AF_INET, SOCK_RAW, 1); }
static int socket_vsock(void) { return socket_of(40, SOCK_STREAM, 0); }
static int socket_abstract(void) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t length = strlen(outside_socket);
    memcpy(address.sun_path + 1, outside_socket, length);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    return got(connect(fd, (void *)&address, offsetof(struct sockaddr_un, sun_path) + 1 + length));
}
static int shared_memory(void) { return got(shmget(0x46534553, 0, 0)); }

static int foreign_calls(void) {
#ifdef __x86_64__
    /* unshare(CLONE_NEWUSER) by its 32-bit number. The filter kills for it. */
    long result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(310), "b"(0x10000000) : "memory");
    return result == 0;
#else
    errno = ENOSYS;
    return 0;
#endif
}
static int x32_calls(void) {
#ifdef __x86_64__
    return allowed(syscall(0x40000000 + SYS_unshare, CLONE_NEWUSER));
#else
    errno = ENOSYS;
    return 0;
#endif
}

/* --- processes outside, and more power --- */

static int signal_outside(void) { return got(kill(outside_pid, SIGKILL)); }
static int trace_outside(void) { return got(ptrace(PTRACE_ATTACH, outside_pid, 0, 0)); }
static int pidfd_outside(void) { return got(syscall(434, outside_pid, 0)); }
static int memory_outside(void) {
    char byte;
    struct iovec here = {&byte, 1}, there = {(void *)0x400000, 1};
    return got(process_vm_readv(outside_pid, &here, 1, &there, 1, 0));
}
static int priority_outside(void) { return got(syscall(SYS_setpriority, 0, outside_pid, 19)); }
static int names_secret(const char *path) {
    char text[65536];
    int fd = open(path, O_RDONLY);
    ssize_t length = fd < 0 ? 0 : read(fd, text, sizeof text);
    return length > 0 && memmem(text, length, "OF_ANOTHER=", 11) != 0;
}
static int environment_of_others(void) { return for_each_process("environ", names_secret); }
static int all_capabilities(void) {
    uint32_t head[2] = {0x20080522, 0}, data[6] = {~0u, ~0u, 0, ~0u, ~0u, 0};
    return got(syscall(SYS_capset, head, data));
}
static int ambient_capability(void) { return got(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, 21, 0, 0)); }
static int secure_bits(void) { return got(prctl(PR_SET_SECUREBITS, 0, 0, 0, 0)); }
static int new_privileges_again(void) { return got(prctl(PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0)); }
static int no_more_filter(void) { return prctl(PR_GET_SECCOMP, 0, 0, 0, 0) != 2; }
static int real_time(void) {
    struct sched_param parameter = {1};
    return got(sched_setscheduler(0, SCHED_FIFO, &parameter));
}
static int more_files(void) {
    uint64_t limit[2] = {1u << 20, 1u << 20};
    return got(syscall(SYS_prlimit64, 0, 7, limit, 0));
}
/* Whoever could have it has ended when this returns. */
static int setuid_program(void) {
    int status;
    pid_t child = fork();
    if (child == 0) {
        /* As somebody else first, if this is root. */
        if (getuid() == 0 && setresuid(1000, 1000, 1000) != 0) _exit(1);
        execl("/setuid", "setuid", "am-i-root", (char *)0);
        _exit(1);
    }
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 42;
}

#define A(name) {#name, name}
static const struct { const char *name; attempt run; } attempts[] = {
    A(mount_tmpfs), A(mount_proc), A(mount_bind), A(mount_disk), A(mount_cgroup), A(mount_cgroup2), A(mount_overlay),
    A(mount_debugfs), A(remount_root), A(remount_proc_sys), A(unmask_kcore), A(unmask_proc_sys), A(share_root),
    A(pivot), A(new_open_tree), A(new_move_mount), A(new_fsopen), A(new_fsconfig), A(new_fsmount), A(new_fspick),
    A(new_mount_setattr), A(change_root), A(unshare_user), A(unshare_mount), A(unshare_net), A(unshare_pid),
    A(unshare_cgroup), A(clone_user), A(clone_user_mount), A(clone_mount), A(clone_three), A(setns_mount),
    A(setns_user), A(setns_net), A(setns_pidfd), A(leaked_descriptors), A(descriptors_of_others), A(roots_of_others),
    A(directories_of_others), A(above_the_root), A(overwrite_programs), A(handle_of_root), A(device_disk),
    A(device_memory), A(device_kmsg), A(device_tun), A(device_console), A(device_of_image), A(device_of_volume),
    A(device_existing), A(terminal_injection), A(io_ports), A(core_pattern), A(modprobe), A(kernel_panic),
    A(host_name_file), A(overcommit), A(binfmt), A(sysrq), A(irq), A(uevent_helper), A(uevent), A(power_state),
    A(release_agent), A(less_likely_to_be_killed), A(own_id_map), A(read_kcore), A(read_kmsg), A(read_keys),
    A(read_timers), A(read_interrupts), A(read_firmware), A(call_keyctl), A(call_add_key), A(call_request_key),
    A(call_bpf), A(call_perf), A(call_userfaultfd), A(call_io_uring_setup), A(call_io_uring_enter),
    A(call_init_module), A(call_finit_module), A(call_delete_module), A(call_kexec), A(call_reboot), A(call_swapon),
    A(call_settimeofday), A(call_clock_settime), A(call_sethostname), A(call_setdomainname), A(call_acct),
    A(call_quotactl), A(call_syslog), A(call_vhangup), A(call_kcmp), A(call_fanotify_init), A(call_move_pages),
    A(call_pidfd_getfd), A(call_process_madvise), A(call_lookup_dcookie), A(call_unknown), A(socket_packet),
    A(socket_raw), A(socket_vsock), A(socket_abstract), A(shared_memory), A(foreign_calls), A(x32_calls),
    A(signal_outside), A(trace_outside), A(pidfd_outside), A(memory_outside), A(priority_outside),
    A(environment_of_others), A(all_capabilities), A(ambient_capability), A(secure_bits), A(new_privileges_again),
    A(no_more_filter), A(real_time), A(more_files), A(setuid_program),
};

/* Overwrites the program that runs the commands, again and again (CVE-2019-5736). */
static void watch_for_commands(void) {
    for (;;) if (for_each_process("exe", is_writable)) puts("SUCCEEDED"), fflush(stdout);
}

/* Whether a descriptor of the agent's program can be opened again, for writing. */
static void reopen(const char *number) {
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%s", number);
    if (open(path, O_WRONLY) >= 0 || truncate(path, 1) == 0) puts("SUCCEEDED");
    else printf("refused %d\n", errno);
}

int main(int count, char **arguments) {
    if (count == 3 && strcmp(arguments[1], "reopen") == 0) return reopen(arguments[2]), 0;
    if (count == 2 && strcmp(arguments[1], "am-i-root") == 0) return geteuid() == 0 ? 42 : 0;
    if (count == 2 && strcmp(arguments[1], "watch") == 0) watch_for_commands();
    if (count != 6) return 2;
    outside_pid = atoi(arguments[1]), outside_file = arguments[2], outside_socket = arguments[3];
    disk_major = atoi(arguments[4]), disk_minor = atoi(arguments[5]);
    setvbuf(stdout, 0, _IOLBF, 0);
    for (size_t i = 0; i < sizeof attempts / sizeof *attempts; i++) {
        int status;
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            errno = 0;
            int through = attempts[i].run();
            if (through) printf("%s SUCCEEDED\n", attempts[i].name);
            else printf("%s refused %d\n", attempts[i].name, errno);
            fflush(stdout);
            _exit(0);
        }
        waitpid(child, &status, 0);
        if (WIFSIGNALED(status)) printf("%s killed %d\n", attempts[i].name, WTERMSIG(status));
    }
    printf("tried %zu\n", sizeof attempts / sizeof *attempts);
    /* Everybody whom this may kill is in here. */
    kill(-1, SIGKILL);
    return 0;
}

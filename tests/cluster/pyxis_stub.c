/*
 * Stands in for pyxis and enroot on the test cluster: a SPANK plugin with pyxis's options for srun and, behind
 * them, what enroot does for an unprivileged user, as far as a program inside can tell.
 *
 *   - Only steps of srun have the options; the batch script never runs inside.
 *   - Each step unpacks the image (a squashfs file) once per node, and it is removed when the step ends.
 *   - A user namespace in which the user has the uid it had, a mount namespace, and the image as a read-only root
 *     (--container-writable makes it writable). /proc, /sys, /dev and /dev/shm are the node's. /tmp, /var/run and
 *     /var/lock are the container's own, in memory. Four files of /etc are the node's. The home directory is
 *     not there without --container-mount-home.
 *   - A mount whose source is missing ends the step.
 *   - The job's environment comes along, but what the image sets in /etc/environment wins, except for variables
 *     named in --container-env; LANG, LANGUAGE and LC_ALL stay outside.
 *   - enroot's hook 50-slurm-pmi mounts PMIX_SERVER_TMPDIR. It runs only where the administrator enabled it: where
 *     a file of that name is in the directory of the plugin's argument `hooks=`.
 *
 * Not done: imports from registries, named containers, entry points, overlays, GPU and InfiniBand hooks.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pwd.h>
#include <limits.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <slurm/spank.h>

SPANK_PLUGIN(pyxis, 1)

#define MOST 64

static char *image, *workdir, *hooks;
static char *mounts[MOST], *kept[MOST];
static int mount_count, kept_count;
static int mount_home = -1, writable = -1;
static char rootfs[128];
static int set_up = -1;

static int split(const char *text, char **into, int *count)
{
	char *copy = strdup(text), *rest = copy, *part;

	*count = 0;
	while ((part = strsep(&rest, ",")) != NULL) {
		if (*part == '\0' || *count == MOST)
			return -1;
		into[(*count)++] = part;
	}
	return 0;
}

static int on_image(int val, const char *arg, int remote)
{
	image = strdup(arg);
	return *arg ? 0 : -1;
}

static int on_mounts(int val, const char *arg, int remote)
{
	if (split(arg, mounts, &mount_count) < 0) {
		slurm_error("pyxis: --container-mounts: invalid format: %s", arg);
		return -1;
	}
	return 0;
}

static int on_workdir(int val, const char *arg, int remote)
{
	workdir = strdup(arg);
	return 0;
}

static int on_env(int val, const char *arg, int remote)
{
	return split(arg, kept, &kept_count);
}

static int on_home(int val, const char *arg, int remote)
{
	mount_home = val;
	return 0;
}

static int on_remap(int val, const char *arg, int remote)
{
	return val ? -1 : 0;	/* the user keeps its uid here; enroot.conf may say otherwise */
}

static int on_writable(int val, const char *arg, int remote)
{
	writable = val;
	return 0;
}

static struct spank_option options[] = {
	{ "container-image", "IMAGE", "[pyxis] squashfs file", 1, 0, on_image },
	{ "container-mounts", "SRC:DST[:FLAGS],...", "[pyxis] bind mounts", 1, 0, on_mounts },
	{ "container-workdir", "PATH", "[pyxis] working directory", 1, 0, on_workdir },
	{ "container-env", "NAME,...", "[pyxis] variables that the image does not override", 1, 0, on_env },
	{ "container-mount-home", NULL, "[pyxis] mount the home directory", 0, 1, on_home },
	{ "no-container-mount-home", NULL, "[pyxis] do not mount it", 0, 0, on_home },
	{ "no-container-remap-root", NULL, "[pyxis] do not remap to root", 0, 0, on_remap },
	{ "container-writable", NULL, "[pyxis] writable root file system", 0, 1, on_writable },
	{ "container-readonly", NULL, "[pyxis] read-only root file system", 0, 0, on_writable },
	SPANK_OPTIONS_TABLE_END,
};

int slurm_spank_init(spank_t sp, int ac, char **av)
{
	spank_context_t context = spank_context();

	for (int i = 0; i < ac; i++)
		if (strncmp(av[i], "hooks=", 6) == 0)
			hooks = strdup(av[i] + 6);
	/* sbatch knows none of them: what it is asked for would reach every step that srun starts. */
	if (context != S_CTX_LOCAL && context != S_CTX_REMOTE)
		return 0;
	for (struct spank_option *option = options; option->name != NULL; option++)
		if (spank_option_register(sp, option) != ESPANK_SUCCESS)
			return -1;
	return 0;
}

static int run(uid_t uid, gid_t gid, char *const argv[])
{
	int status;
	pid_t pid = fork();

	if (pid == 0) {
		int null = open("/dev/null", O_RDWR);

		dup2(null, 0);
		dup2(null, 1);
		if (setresgid(gid, gid, gid) < 0 || setresuid(uid, uid, uid) < 0)
			_exit(126);
		execvp(argv[0], argv);
		_exit(127);
	}
	if (pid < 0 || waitpid(pid, &status, 0) < 0)
		return -1;
	return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : -1;
}

static int fail(const char *what, const char *path)
{
	slurm_error("pyxis: %s %s: %s", what, path, strerror(errno));
	return -1;
}

/* Directories on the way to `path`, and `path` itself as a directory or, for a file, as an empty file. */
static int make_target(char *path, bool directory)
{
	for (char *slash = strchr(path + 1, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
		*slash = '\0';
		if (mkdir(path, 0755) < 0 && errno != EEXIST)
			return fail("mkdir", path);
		*slash = '/';
	}
	if (directory)
		return mkdir(path, 0755) < 0 && errno != EEXIST ? fail("mkdir", path) : 0;
	int fd = open(path, O_WRONLY | O_CREAT, 0644);

	if (fd < 0)
		return fail("create", path);
	close(fd);
	return 0;
}

/* What enroot's hook 10-shadow does: the user has a name and a home directory of its own inside. */
static int add_user(uid_t uid, gid_t gid)
{
	char path[PATH_MAX];
	struct passwd *user = getpwuid(uid);
	FILE *file;

	if (user == NULL)
		return fail("look up", "the user");
	snprintf(path, sizeof(path), "%s/etc/passwd", rootfs);
	if ((file = fopen(path, "a")) == NULL)
		return fail("open", path);
	fprintf(file, "%s:x:%u:%u::%s:/bin/sh\n", user->pw_name, uid, gid, user->pw_dir);
	fclose(file);
	snprintf(path, sizeof(path), "%s%s", rootfs, user->pw_dir);
	return make_target(path, true);
}

static int create(spank_t sp)
{
	uid_t uid;
	gid_t gid;
	uint32_t job, step;
	char parent[64];

	spank_get_item(sp, S_JOB_UID, &uid);
	spank_get_item(sp, S_JOB_GID, &gid);
	spank_get_item(sp, S_JOB_ID, &job);
	spank_get_item(sp, S_JOB_STEPID, &step);
	if (access(image, R_OK) < 0) {
		slurm_error("pyxis: couldn't open %s: %s", image, strerror(errno));
		return -1;
	}
	for (int i = 0; i < mount_count; i++) {
		char source[PATH_MAX];

		snprintf(source, sizeof(source), "%.*s", (int)strcspn(mounts[i], ":"), mounts[i]);
		if (access(source, F_OK) < 0) {
			slurm_error("pyxis: --container-mounts: source path does not exist: %s", source);
			return -1;
		}
	}
	snprintf(parent, sizeof(parent), "/tmp/enroot-%u", uid);
	if (mkdir(parent, 0700) < 0 && errno != EEXIST)
		return -1;
	snprintf(rootfs, sizeof(rootfs), "%s/pyxis_%u.%u", parent, job, step);
	if (run(uid, gid, (char *const[]){ "unsquashfs", "-no-progress", "-quiet", "-no-xattrs", "-dest", rootfs,
					    image, NULL }) < 0) {
		slurm_error("pyxis: failed to create container filesystem for image: %s", image);
		return -1;
	}
	return add_user(uid, gid);
}

/* Once per step and node, with the user's rights: what `enroot create` does. Slurm makes nothing of an error
 * here, so that the task has to fail, as pyxis's does. */
int slurm_spank_user_init(spank_t sp, int ac, char **av)
{
	if (image != NULL && spank_remote(sp))
		set_up = create(sp);
	return 0;
}

int slurm_spank_exit(spank_t sp, int ac, char **av)
{
	if (rootfs[0] == '\0' || !spank_remote(sp))
		return 0;
	return run(0, 0, (char *const[]){ "rm", "-rf", "--one-file-system", rootfs, NULL });
}

static int write_file(const char *path, const char *format, unsigned value)
{
	int fd = open(path, O_WRONLY);
	int rv = fd < 0 ? -1 : dprintf(fd, format, value, value);

	if (fd >= 0)
		close(fd);
	return rv < 0 ? -1 : 0;
}

static int bind(const char *source, const char *target, const char *flags)
{
	struct stat found;
	char inside[PATH_MAX];

	if (stat(source, &found) < 0)
		return fail("stat", source);
	snprintf(inside, sizeof(inside), "%s%s", rootfs, target);
	if (access(inside, F_OK) < 0 && make_target(inside, S_ISDIR(found.st_mode)) < 0)
		return -1;
	if (mount(source, inside, NULL, MS_BIND | MS_REC, NULL) < 0)
		return fail("bind", inside);
	if (flags != NULL && strcmp(flags, "ro") == 0) {
		/* The flags that the source's mount has are locked in a user namespace. */
		struct mount_attr { unsigned long long set, clear, propagation, userns; } readonly = { .set = 1 };

		if (syscall(442 /* mount_setattr */, -1, inside, 0, &readonly, sizeof(readonly)) < 0)
			return fail("remount", inside);
	}
	return 0;
}

static int bind_entry(const char *entry)
{
	char *copy = strdup(entry), *rest = copy;
	char *source = strsep(&rest, ":");
	char *target = rest == NULL ? source : strsep(&rest, ":");
	int rv = bind(source, target, rest);

	free(copy);
	return rv;
}

static int own_memory(const char *path)
{
	char inside[PATH_MAX];

	snprintf(inside, sizeof(inside), "%s%s", rootfs, path);
	if (access(inside, F_OK) < 0 && make_target(inside, true) < 0)
		return -1;
	return mount("tmpfs", inside, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755") < 0 ? fail("mount", inside) : 0;
}

static bool is_kept(const char *name)
{
	for (int i = 0; i < kept_count; i++)
		if (strcmp(kept[i], name) == 0)
			return true;
	return false;
}

static void import_environment(spank_t sp)
{
	static const char *const outside[] = { "LANG", "LANGUAGE", "LC_ALL" };
	char path[PATH_MAX], line[4096], value[4096];
	FILE *file;

	for (int i = 0; i < 3; i++)
		if (!is_kept(outside[i]))
			spank_unsetenv(sp, outside[i]);
	snprintf(path, sizeof(path), "%s/etc/environment", rootfs);
	if ((file = fopen(path, "r")) == NULL)
		return;
	while (fgets(line, sizeof(line), file) != NULL) {
		char *equals = strchr(line, '=');

		line[strcspn(line, "\n")] = '\0';
		if (equals == NULL)
			continue;
		*equals = '\0';
		if (is_kept(line) && spank_getenv(sp, line, value, sizeof(value)) == ESPANK_SUCCESS && *value)
			continue;
		spank_setenv(sp, line, equals + 1, 1);
	}
	fclose(file);
}

static int pmi_hook(spank_t sp)
{
	static const char *const modules[][2] = {
		{ "PMIX_PTL_MODULE", "PMIX_MCA_ptl" },
		{ "PMIX_SECURITY_MODE", "PMIX_MCA_psec" },
		{ "PMIX_GDS_MODULE", "PMIX_MCA_gds" },
	};
	char hook[PATH_MAX], value[PATH_MAX];

	snprintf(hook, sizeof(hook), "%s/50-slurm-pmi.sh", hooks ? hooks : "");
	if (access(hook, F_OK) < 0)
		return 0;
	for (int i = 0; i < 3; i++)
		if (spank_getenv(sp, modules[i][0], value, sizeof(value)) == ESPANK_SUCCESS)
			spank_setenv(sp, modules[i][1], value, 0);
	if (spank_getenv(sp, "PMIX_SERVER_TMPDIR", value, sizeof(value)) == ESPANK_SUCCESS)
		return bind(value, value, NULL);
	return 0;
}

/* In the task, with the user's rights, just before the program: what `enroot start` does. */
int slurm_spank_task_init(spank_t sp, int ac, char **av)
{
	static const char *const node_s[] = { "/proc", "/sys", "/dev", "/etc/hosts", "/etc/hostname",
					      "/etc/resolv.conf" };
	static const char *const own[] = { "/tmp", "/var/run", "/var/lock" };
	uid_t uid = geteuid();
	gid_t gid = getegid();
	char home[PATH_MAX];

	if (image == NULL || !spank_remote(sp))
		return 0;
	if (set_up < 0)
		return -1;
	import_environment(sp);
	/* What was root before and has not called exec yet does not own its files in /proc. */
	if (prctl(PR_SET_DUMPABLE, 1) < 0)
		return fail("prctl", "dumpable");
	if (unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0)
		return fail("unshare", "namespaces");
	if (write_file("/proc/self/setgroups", "deny", 0) < 0 || write_file("/proc/self/uid_map", "%u %u 1", uid) < 0 ||
	    write_file("/proc/self/gid_map", "%u %u 1", gid) < 0)
		return fail("write", "uid_map");
	if (mount(NULL, "/", NULL, MS_PRIVATE | MS_REC, NULL) < 0 ||
	    mount(rootfs, rootfs, NULL, MS_BIND | MS_REC, NULL) < 0)
		return fail("bind", rootfs);
	for (size_t i = 0; i < sizeof(node_s) / sizeof(*node_s); i++)
		if (access(node_s[i], F_OK) == 0 && bind(node_s[i], node_s[i], NULL) < 0)
			return -1;
	for (size_t i = 0; i < sizeof(own) / sizeof(*own); i++)
		if (own_memory(own[i]) < 0)
			return -1;
	if (mount_home == 1 && spank_getenv(sp, "HOME", home, sizeof(home)) == ESPANK_SUCCESS &&
	    bind(home, home, NULL) < 0)
		return -1;
	if (pmi_hook(sp) < 0)
		return -1;
	for (int i = 0; i < mount_count; i++)
		if (bind_entry(mounts[i]) < 0)
			return -1;
	if (writable != 1 &&
	    mount(NULL, rootfs, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, NULL) < 0)
		return fail("remount", rootfs);
	if (chdir(rootfs) < 0 || syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0)
		return fail("pivot_root", rootfs);
	if (chdir(workdir ? workdir : "/") < 0)
		return fail("chdir", workdir ? workdir : "/");
	return 0;
}

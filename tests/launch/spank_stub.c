/* spank_stub: a small stand-in for a container SPANK plugin, for tests on a machine without Pyxis/Enroot.
 *
 * It accepts the srun options that Pyxis accepts and gives every task, without privileges,
 *   - a mount namespace (and a user namespace, unless the job is root's); the root is an overlay: lower =
 *     --container-image when that is a directory, else the plugin argument root=DIR, else the host's "/" (root's
 *     jobs only: "/" has locked submounts in a user namespace); upper = a tmpfs of the task;
 *   - a read-only root unless --container-writable, a fresh /tmp, the host's /proc /sys /dev and users;
 *   - --container-mounts as bind mounts (SRC:DST[:FLAGS] or PATH); missing mount points are created;
 *   - uid 0 with --container-remap-root, else the user's own id;
 *   - --container-workdir as working directory, else "/";
 *   - the variables of the image's /etc/environment, but for those that --container-env names; then what the
 *     image's /etc/profile makes of them, as Enroot runs the task in a login shell;
 *   - bind mounts that the image's /etc/fstab asks for (SRC DST none OPTIONS).
 * Like with Pyxis, a missing image, mount source or workdir fails the task, and so does --container-name
 * of a container that no earlier step made on this node with --container-image. Named containers outlive their
 * job, as with Pyxis's default container_scope=global, and a second --container-image of the same name is ignored.
 * The root directory must belong to the job's user (root for jobs of root), as files keep their owner.
 * Not modelled: entrypoint, changes kept in a named container, --container-save, unpacking of a .sqsh.
 *
 * gcc -std=gnu11 -Wall -Wextra -O2 -fPIC -shared -o spank_stub.so spank_stub.c      (libslurm-dev)
 * plugstack.conf:  required /path/spank_stub.so [root=DIR] [state=/run/spank_stub]
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <slurm/spank.h>

SPANK_PLUGIN(container_stub, 1)

enum { IMAGE, MOUNTS, WORKDIR, NAME, SAVE, ENVNAMES, UNSHARE, HOME, NOHOME, REMAP, NOREMAP,
       ENTRY, NOENTRY, ENTRYLOG, WRITABLE, READONLY, NOPT };

static char *val[NOPT];

static int take(int which, const char *arg, int remote)
{
	char *old = val[which];

	(void)remote;
	if (which == MOUNTS && old != NULL) {		/* repeated: append */
		if (asprintf(&val[which], "%s,%s", old, arg) < 0)
			return -1;
	} else {
		val[which] = strdup(arg != NULL ? arg : "1");
	}
	free(old);
	return val[which] != NULL ? 0 : -1;
}

#define OPT(name, arg, id) { name, arg, "[stub] container option", (arg) != NULL, id, take }
static struct spank_option options[NOPT] = {
	OPT("container-image", "IMAGE|PATH", IMAGE), OPT("container-mounts", "SRC:DST[:FLAGS][,...]", MOUNTS),
	OPT("container-workdir", "PATH", WORKDIR), OPT("container-name", "NAME", NAME),
	OPT("container-save", "PATH", SAVE), OPT("container-env", "NAME[,NAME...]", ENVNAMES),
	OPT("container-unshare", "NS[,NS...]", UNSHARE), OPT("container-mount-home", NULL, HOME),
	OPT("no-container-mount-home", NULL, NOHOME), OPT("container-remap-root", NULL, REMAP),
	OPT("no-container-remap-root", NULL, NOREMAP), OPT("container-entrypoint", NULL, ENTRY),
	OPT("no-container-entrypoint", NULL, NOENTRY), OPT("container-entrypoint-log", NULL, ENTRYLOG),
	OPT("container-writable", NULL, WRITABLE), OPT("container-readonly", NULL, READONLY),
};

static const char *plugin_arg(int ac, char **av, const char *key, const char *dflt)
{
	size_t n = strlen(key);

	for (int i = 0; i < ac; ++i)
		if (strncmp(av[i], key, n) == 0 && av[i][n] == '=')
			return av[i] + n + 1;
	return dflt;
}

int slurm_spank_init(spank_t sp, int ac, char **av)
{
	spank_context_t where = spank_context();
	const char *state = plugin_arg(ac, av, "state", "/run/spank_stub");

	if (where != S_CTX_LOCAL && where != S_CTX_REMOTE)
		return 0;
	if (where == S_CTX_REMOTE && mkdir(state, 0755) == 0 && chmod(state, 01777) < 0)	/* as root */
		return -1;
	for (int i = 0; i < NOPT; ++i)
		if (spank_option_register(sp, &options[i]) != ESPANK_SUCCESS)
			return -1;
	return 0;
}

/* mkdir -p PATH; with is_dir == 0 its last component is an empty file instead */
static int make_point(const char *path, int is_dir)
{
	char p[PATH_MAX];
	int fd;

	if (snprintf(p, sizeof(p), "%s", path) >= (int)sizeof(p))
		return -1;
	for (char *s = p + 1; (s = strchr(s, '/')) != NULL; *s++ = '/') {
		*s = '\0';
		if (mkdir(p, 0755) < 0 && access(p, F_OK) < 0)
			return -1;
	}
	if (access(p, F_OK) == 0)
		return 0;
	if (is_dir)
		return mkdir(p, 0755) < 0 && errno != EEXIST ? -1 : 0;
	fd = open(p, O_CREAT | O_WRONLY | O_CLOEXEC, 0644);
	return fd < 0 ? -1 : close(fd);
}

static int bind_into(const char *root, const char *src, const char *dst, const char *flags)
{
	const unsigned long locked = MS_NOSUID | MS_NODEV | MS_NOEXEC;
	char full[PATH_MAX], item[512];
	struct statvfs fs;
	struct stat st;
	int ro = 0;

	if (stat(src, &st) < 0 || statvfs(src, &fs) < 0) {
		slurm_error("stub: --container-mounts: source path does not exist: %s", src);
		return -1;
	}
	snprintf(item, sizeof(item), "%s", flags);
	for (char *save, *f = strtok_r(item, "+", &save); f != NULL; f = strtok_r(NULL, "+", &save))
		ro = strcmp(f, "ro") == 0 ? 1 : strcmp(f, "rw") == 0 ? 0 : ro;
	if (dst[0] != '/' || snprintf(full, sizeof(full), "%s%s", root, dst) >= (int)sizeof(full) ||
	    make_point(full, S_ISDIR(st.st_mode)) < 0 || mount(src, full, NULL, MS_BIND | MS_REC, NULL) < 0 ||
	    (ro && mount(NULL, full, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY | (fs.f_flag & locked), NULL) < 0)) {
		slurm_error("stub: cannot mount %s on %s: %s", src, dst, strerror(errno));
		return -1;
	}
	return 0;
}

static int bind_all(const char *root, char *list)
{
	for (char *s1, *m = strtok_r(list, ",", &s1); m != NULL; m = strtok_r(NULL, ",", &s1)) {
		char *dst = strchr(m, ':'), *flags = NULL;

		if (dst != NULL) {
			*dst++ = '\0';
			if ((flags = strchr(dst, ':')) != NULL)
				*flags++ = '\0';
		}
		if (bind_into(root, m, dst != NULL ? dst : m, flags != NULL ? flags : "") < 0)
			return -1;
	}
	return 0;
}

static int put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	int rv = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text) ? 0 : -1;

	if (fd >= 0)
		close(fd);
	return rv;
}

static int listed(const char *list, const char *name, size_t length)
{
	for (const char *at = list; at != NULL && *at != '\0'; at += strcspn(at, ",") + (at[strcspn(at, ",")] != '\0'))
		if (strcspn(at, ",") == length && strncmp(at, name, length) == 0)
			return 1;
	return 0;
}

/* the image's variables win over the job's, but for those that --container-env names; enroot keeps them in this file too */
static void image_environment(spank_t sp, const char *image)
{
	char path[PATH_MAX], line[4096], *equals;
	FILE *f;

	snprintf(path, sizeof(path), "%s/etc/environment", image);
	if (strcmp(image, "/") == 0 || (f = fopen(path, "r")) == NULL)
		return;
	while (fgets(line, sizeof(line), f) != NULL) {
		line[strcspn(line, "\n")] = '\0';
		if ((equals = strchr(line, '=')) == NULL || listed(val[ENVNAMES], line, (size_t)(equals - line)))
			continue;
		*equals = '\0';
		spank_setenv(sp, line, equals + 1, 1);
	}
	fclose(f);
}

/* inside the new root: the environment after a login shell's /etc/profile, and what it does to PATH and HOME */
static int login_environment(spank_t sp)
{
	static char text[1 << 20];
	char **env, *argv[] = { "sh", "-c", ". /etc/profile >/dev/null 2>&1; exec /usr/bin/env -0", NULL };
	size_t length = 0;
	ssize_t n;
	int ends[2];
	pid_t pid;

	if (access("/etc/profile", R_OK) < 0 || access("/bin/sh", X_OK) < 0)
		return 0;
	if (spank_get_item(sp, S_JOB_ENV, &env) != ESPANK_SUCCESS || pipe(ends) < 0 || (pid = fork()) < 0)
		return -1;
	if (pid == 0) {
		dup2(ends[1], 1);
		close(ends[0]);
		execve("/bin/sh", argv, env);
		_exit(127);
	}
	close(ends[1]);
	while (length < sizeof(text) - 1 && (n = read(ends[0], text + length, sizeof(text) - 1 - length)) > 0)
		length += (size_t)n;
	close(ends[0]);
	waitpid(pid, NULL, 0);
	for (char *at = text, *equals; at < text + length; at += strlen(at) + 1) {
		if ((equals = strchr(at, '=')) == NULL)
			continue;
		*equals = '\0';
		spank_setenv(sp, at, equals + 1, 1);
		*equals = '=';
	}
	return 0;
}

static int mount_fstab(const char *root, const char *image)
{
	char path[PATH_MAX], src[PATH_MAX / 2], dst[PATH_MAX / 2], flags[512];
	FILE *f;
	int rv = 0;

	snprintf(path, sizeof(path), "%s/etc/fstab", image);
	if (strcmp(image, "/") == 0 || (f = fopen(path, "r")) == NULL)
		return 0;
	while (rv == 0 && fscanf(f, "%2047s %2047s %*s %511s", src, dst, flags) == 3)
		rv = bind_into(root, src, dst, strstr(flags, "ro") != NULL ? "ro" : "rw");
	fclose(f);
	return rv;
}

static int new_namespaces(void)
{
	char uid[64], gid[64];

	if (geteuid() == 0)				/* root needs no user namespace, and can overlay the host's "/" */
		return unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ? -1 : 0;
	snprintf(uid, sizeof(uid), "%u %u 1", val[REMAP] != NULL ? 0 : geteuid(), geteuid());
	snprintf(gid, sizeof(gid), "%u %u 1", val[REMAP] != NULL ? 0 : getegid(), getegid());
	prctl(PR_SET_DUMPABLE, 1);			/* slurmstepd changed its uid: /proc/self is root's */
	return unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0 || put("/proc/self/setgroups", "deny") < 0 ||
	       put("/proc/self/uid_map", uid) < 0 || put("/proc/self/gid_map", gid) < 0 ||
	       mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ? -1 : 0;
}

/* the overlay at WORK/root, with WORK a directory that exists */
static int enter_root(const char *work, const char *lower)
{
	static const char *const keep[] = { "/proc", "/sys", "/dev", "/etc/passwd", "/etc/group", "/etc/hosts" };
	char root[PATH_MAX], tmp[PATH_MAX], opts[PATH_MAX + 64];

	snprintf(root, sizeof(root), "%s/root", work);
	snprintf(tmp, sizeof(tmp), "%s/root/tmp", work);
	snprintf(opts, sizeof(opts), "lowerdir=%s,upperdir=up,workdir=work%s", lower, geteuid() == 0 ? "" : ",userxattr");
	if (mount("tmpfs", work, "tmpfs", MS_NOSUID, "mode=755") < 0 || chdir(work) < 0 ||
	    mkdir("up", 0755) < 0 || mkdir("work", 0755) < 0 || mkdir("root", 0755) < 0 ||
	    mount("overlay", "root", "overlay", 0, opts) < 0)
		return -1;
	for (size_t i = 0; i < sizeof(keep) / sizeof(*keep); ++i)
		if (bind_into(root, keep[i], keep[i], "") < 0)
			return -1;
	if (mount("tmpfs", tmp, "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777") < 0 || mount_fstab(root, lower) < 0 ||
	    (val[MOUNTS] != NULL && bind_all(root, val[MOUNTS]) < 0) ||
	    (val[WRITABLE] == NULL && mount(NULL, root, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL) < 0))
		return -1;
	return chdir(root) < 0 || syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0 ? -1 : chdir("/");
}

/* as the user, in the forked task, just before exec */
int slurm_spank_task_init(spank_t sp, int ac, char **av)
{
	const char *state = plugin_arg(ac, av, "state", "/run/spank_stub");
	const char *lower = plugin_arg(ac, av, "root", "/"), *image = val[IMAGE];
	char path[PATH_MAX], work[512], made[PATH_MAX] = "";
	struct stat st;

	if (val[IMAGE] == NULL && val[NAME] == NULL)
		return 0;
	/* a container of this name is a symbolic link STATE/UID_NAME to its root directory; it outlives its job */
	snprintf(path, sizeof(path), "%s/%u_%s", state, geteuid(), val[NAME] != NULL ? val[NAME] : "");
	path[strcspn(path, ":")] = '\0';		/* NAME:create, NAME:exec, ... */
	if (val[NAME] != NULL && readlink(path, made, sizeof(made) - 1) > 0) {
		lower = made;				/* like Pyxis: it exists, the image is not looked at */
		image = NULL;
	} else if (image == NULL) {
		slurm_error("stub: no container named \"%s\", and --container-image is not set", val[NAME]);
		return -1;
	}
	if (image != NULL && strspn(image, "./") > 0) {
		if (stat(image, &st) < 0) {
			slurm_error("stub: image %s: %s", image, strerror(errno));
			return -1;
		}
		if (S_ISDIR(st.st_mode))
			lower = image;
	}
	image_environment(sp, lower);
	snprintf(work, sizeof(work), "%s/work_%u", state, geteuid());
	if (make_point(work, 1) < 0 || (val[NAME] != NULL && symlink(lower, path) < 0 && errno != EEXIST) ||
	    new_namespaces() < 0 || enter_root(work, lower) < 0) {
		slurm_error("stub: cannot set up the container: %s", strerror(errno));
		return -1;
	}
	if (strcmp(lower, "/") != 0 && login_environment(sp) < 0)
		return -1;
	if (val[WORKDIR] != NULL && chdir(val[WORKDIR]) < 0) {
		slurm_error("stub: couldn't chdir to %s: %s", val[WORKDIR], strerror(errno));
		return -1;
	}
	return 0;
}

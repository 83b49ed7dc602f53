# Shared by the scripts beside it; sourced, never run. What is said goes to stderr, so that stdout stays the tool's.

# Debian keeps ip, iptables and bpftool where an ordinary user's PATH does not look.
export PATH="$PATH:/usr/sbin:/sbin"
# An active virtual environment or a foreign PYTHONPATH would shadow the system Python that bcc belongs to.
unset PYTHONHOME PYTHONPATH VIRTUAL_ENV

say() { printf '==> %s\n' "$*" >&2; }

# fail MESSAGE [NEXT STEP]...
fail() {
	printf 'error: %s\n' "$1" >&2
	shift
	local step
	for step in "$@"; do printf '       %s\n' "$step" >&2; done
	exit 1
}

is_root() { [ "$(id -u)" -eq 0 ]; }

# need_root WHY: leaves with the next step to take unless `as_root` can work; asks for the password here, once,
# where nothing else is writing to the terminal.
need_root() {
	is_root && return
	command -v sudo >/dev/null || fail "$1 needs root, and there is no sudo here." "Run the same command as root."
	if [ -t 0 ]; then
		sudo -v || fail "$1 needs root, and sudo refused." "Run the same command as root."
	else
		sudo -n true 2>/dev/null || fail "$1 needs root, and sudo wants a password but has no terminal to ask on." \
			"Run the same command as root, or in a terminal."
	fi
}

# as_root COMMAND...: only the named variables cross, by name: `sudo env A=b` would show their values (OTLP
# headers carry tokens) to everyone who can list processes.
as_root() {
	if is_root; then
		"$@"
		return
	fi
	local keep
	keep=$(compgen -e | grep -E '^(EBFW_|OTEL_|BENCH_|PYTEST_|HYPOTHESIS_|PIP_)|_proxy$|_PROXY$|^(CI|GOPROXY|GOSUMDB|GOFLAGS|TERM|COLORTERM|NO_COLOR|COLUMNS|LANG|LC_ALL|TZ|SSL_CERT_FILE|SSL_CERT_DIR|PYTHONDONTWRITEBYTECODE|PYTHONUNBUFFERED|DEBIAN_FRONTEND|NEEDRESTART_SUSPEND)$' |
		paste -sd, -) || true
	sudo ${keep:+--preserve-env="$keep"} -- "$@"
}

# progress TEXT COMMAND...: runs COMMAND with its output kept aside, shows that time passes, and shows the end of
# the output when it fails. A terminal gets one line that counts, a log file a line every 15 seconds.
progress() {
	local text=$1 log pid start=$SECONDS shown=0 status=0
	shift
	log=$(mktemp)
	say "$text"
	"$@" >"$log" 2>&1 </dev/null &
	pid=$!
	# A background child of a script ignores Ctrl-C, so it is passed on by hand.
	trap 'kill "$pid" 2>/dev/null; rm -f "$log"; exit 130' INT TERM
	while kill -0 "$pid" 2>/dev/null; do
		sleep 0.2
		[ $((SECONDS - start)) -gt "$shown" ] || continue
		shown=$((SECONDS - start))
		if [ -t 2 ]; then
			printf '\r\033[K    %d s  %.100s' "$shown" "$(tail -n 1 "$log" | tr -d '\r\033' | cut -c1-100)" >&2
		elif [ $((shown % 15)) -eq 0 ]; then
			printf '    still at it after %d s\n' "$shown" >&2
		fi
	done
	wait "$pid" || status=$?
	trap - INT TERM
	[ ! -t 2 ] || [ "$shown" -eq 0 ] || printf '\r\033[K' >&2
	if [ "$status" -ne 0 ]; then
		tail -n 20 "$log" | sed 's/^/    /' >&2
	elif [ "$shown" -ge 2 ]; then
		printf '    done in %d s\n' $((SECONDS - start)) >&2
	fi
	rm -f "$log"
	return "$status"
}

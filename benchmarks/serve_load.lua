-- Load for serve.py from wrk (Debian: apt-get install wrk): JPEG files, one in each form, in turn.
--
--   python serve.py -model=output/RUN -max_requests=1000 &
--   wrk -t1 -c16 -d90s --latency --timeout 60s -s benchmarks/serve_load.lua http://127.0.0.1:8000/predict -- images/*.jpg
--
-- wrk prints the latencies; this script adds how many responses had each status, and how many of the refusals said
-- when to try again. A refused connection waits as long as it was told to; with the environment variable RUDE set, it
-- tries again at once.
local bodies, next_body, counts, retry_after, pause = {}, 0, {}, 0, 0
local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  for _, path in ipairs(args) do
    local file = assert(io.open(path, 'rb'))
    table.insert(bodies, '--edge\r\nContent-Disposition: form-data; name="image"; filename="x.jpg"\r\n\r\n'
      .. file:read('*a') .. '\r\n--edge--\r\n')
    file:close()
  end
  assert(#bodies > 0, 'name JPEG files after --')
end

function request()
  next_body = next_body % #bodies + 1
  return wrk.format('POST', nil, {['Content-Type'] = 'multipart/form-data; boundary=edge'}, bodies[next_body])
end

function delay()  -- milliseconds before the request
  local milliseconds = pause
  pause = 0
  return milliseconds
end

function response(status, headers)
  counts[status] = (counts[status] or 0) + 1
  for name, value in pairs(headers) do
    if name:lower() == 'retry-after' then
      retry_after = retry_after + 1
      pause = os.getenv('RUDE') and 0 or 1000 * tonumber(value)
    end
  end
  statuses = ''  -- global, as thread:get reads it, and text, since it passes no tables
  for number, count in pairs(counts) do
    statuses = statuses .. string.format('  %d responses with status %d\n', count, number)
  end
  retries = retry_after
end

function done(summary)
  for _, thread in ipairs(threads) do
    io.write(thread:get('statuses') or '', string.format('  %d responses with Retry-After\n', thread:get('retries') or 0))
  end
  io.write(string.format('  errors: connect %d, read %d, write %d, timeout %d\n', summary.errors.connect,
    summary.errors.read, summary.errors.write, summary.errors.timeout))
end
